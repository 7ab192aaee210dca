"""What may have been missed is read back: after a doubt, a table is compared with what was told of it.

The row index holds what was told of each row, the table shows what there is. What differs, or is in one of the two
alone, is told as changes that are marked repaired; they are completed as all others are, so that a row that has left or
ended meanwhile is told to exactly those who saw it. Nothing depends on a clock of the database or on how long a
transaction took to commit: a row is compared with its like, not with a time. Texts that are too long for the index are
told apart by the repair column alone, and not at all where the last change of the row did not bring them: then the row
is told again; a table without the column, like all that cannot be proven, is told as one `resync`.

The order. Live changes are never held up. Behind the doubt the source misses nothing (else it doubts again, and the
reading counts for nothing), so a row of which a live change has told since is brought to what there is by the live
changes alone, and is left to them. All other rows wait until the source has proven that everything that was committed
before they were read is appended. Then what was read is newer than everything that was told of them, and older than
everything still to come; there it is told. Meanwhile nothing is proven to the readers either: `complete_until` stands.

Readers who may have read the table themselves since the last proof have copies that nothing here knows of: rows that
came and went unheard, say. They alone are told a `resync`.

A source may be further behind than it takes for proven (see `supabase_link`). Then a change may still come that is
older than what was read back: it is not told, and is another doubt.

Layer: core. May import: words, policy.ordering, broker.base, sources.base, rows, row_versions.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NoReturn

import orjson

from realtime_bridge.broker.base import NOTE, Broker
from realtime_bridge.change import ABSENT, Body, Change, Control, Image, Operation, Relation
from realtime_bridge.errors import BridgeError, BrokerError, ForkError, LeaseLostError
from realtime_bridge.policy.ordering import OrderKey
from realtime_bridge.row_versions import differs, is_older, short, version
from realtime_bridge.rows import Note, RowIndex, decode_row, field_of, is_incomplete
from realtime_bridge.sources.base import TableReader

logger = logging.getLogger(__name__)

REPAIR_SECONDS: Final = 20.0
"""From a table's first doubt: what is not repaired by then is told as a resync."""
MOST_CHANGED: Final = 1_000
MOST_BYTES: Final = 16 * 2**20
"""Of a table, more rows or bytes than this are better read by each reader for itself."""
_FORGOTTEN_SECONDS: Final = 60.0
"""A deadline that has passed so long ago is of a doubt that another process has taken over."""
_KEYS_AT_ONCE: Final = 50
_TOLD_AT_ONCE: Final = 500
_PAUSE: Final = 1.0
"""However many doubts there are, the tables are not read more often than this."""


@dataclass(frozen=True, slots=True)
class RepairLimits:
    """What can be repaired.

    Attributes:
        column: changes with every change of a row.
        rows: of a table; with more it is not compared.
    """

    column: str
    rows: int


@dataclass
class RepairState:
    """What repairing is doing, for metrics, and across terms.

    Attributes:
        told: changes that were told as repaired, by this process.
        resyncs: told in place of a repair, by this process.
        deadlines: table in doubt → when it is given up, by the loop's clock. They outlive a term, so that a link that
            is made anew again and again cannot put them off.
        problems: table → why it was given up last, unless it has been repaired since: each is logged once.
    """

    told: int = 0
    resyncs: int = 0
    deadlines: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class _UnprovableError(Exception):
    """A table cannot be repaired; the message says why."""


class _Told(NamedTuple):
    """Rows as they were read back and told lately, unless newer ones were told since, by field."""

    relation: Relation
    rows: dict[str, Image]


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was found to be other than it was told.

    Attributes:
        touched: of the doubt that it answers, and of no other.
        since: microseconds since 1970: until then, nothing was missing.
        rows: field → the row as it stands, None for one that is gone.
    """

    relation: Relation
    touched: set[str]
    since: int
    rows: Mapping[str, Image | None]


class Repairer:
    """Repairs tables during one term of leading.

    Args:
        token: of the lease.
    """

    def __init__(
        self, broker: Broker, reader: TableReader, rows: RowIndex, limits: RepairLimits, state: RepairState, token: str
    ) -> None:
        self._broker = broker
        self._reader = reader
        self._rows = rows
        self._limits = limits
        self._state = state
        self._token = token
        self._doubted = asyncio.Event()
        self._proved = asyncio.Event()
        self._proven_until: float | None = None
        self._told: dict[str, _Told] = {}

    # -- what the copying of the source tells ------------------------------------------------------------------------

    def doubt(self, tables: Iterable[str]) -> None:
        """Changes may be missing before what is appended next, and none behind that."""
        now, deadlines = asyncio.get_running_loop().time(), self._state.deadlines
        for table in tables:
            self._rows.touched[table] = set()
            if deadlines.get(table, -math.inf) < now - _FORGOTTEN_SECONDS:
                deadlines[table] = now + REPAIR_SECONDS
            self._doubted.set()

    def prove(self, proven_until: float) -> None:
        """Everything that was committed before is appended, but for what is in doubt.

        The newest proof counts, be it of an earlier time: then a clock was set back, and the former means nothing now.
        """
        self._proven_until = proven_until
        self._proved.set()

    def sift(self, bodies: Sequence[Body]) -> tuple[Sequence[Body], str | None]:
        """The bodies up to the first that is not to be told, and the table of that one: from there on it is in doubt.

        A change is not told if it is older than what was read back, or brings only some values of a row that may
        have changed in others unheard.
        """
        for i, body in enumerate(bodies):
            if isinstance(body, Change) and (self._is_partial(body) or self._is_late(body)):
                return bodies[:i], body.relation.name
        return bodies, None

    def _is_partial(self, change: Change) -> bool:
        return change.new is not None and ABSENT in change.new and change.relation.name in self._rows.touched

    def _is_late(self, change: Change) -> bool:
        relation, row, told = change.relation, change.new, self._told.get(change.relation.name)
        if told is None or told.relation != relation or row is None:
            return False
        name = field_of(relation, row) or ""
        before = told.rows.get(name)
        if before is None:
            return False
        if is_older(relation, self._limits.column, row, before):
            return True
        del told.rows[name]
        return False

    # -- repairing -----------------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Repair what is in doubt, for ever.

        Raises:
            BrokerError, LeaseLostError, ForkError: the term is over.
        """
        while True:
            await self._doubted.wait()
            self._doubted.clear()
            await self._round()
            async with self._rows.turn:  # so that no newer proof is told before this one
                if self._rows.touched:
                    self._doubted.set()
                else:
                    await self._broker.append(self._token, (), proven_until=self._proven_until)
            await asyncio.sleep(_PAUSE)

    async def _round(self) -> None:
        """Try once to repair every table in doubt; those that are doubted again meanwhile stay in doubt."""
        readings: dict[str, _Reading] = {}
        problems: dict[str, str] = {}
        for table in list(self._rows.touched):
            found = await self._try(table)
            if isinstance(found, _Reading):
                readings[table] = found
            else:
                problems[table] = found
        if problems:
            await self._give_up(problems)
        moment = time.time()
        waiting = [table for table, reading in readings.items() if reading.rows]
        for table, reading in readings.items():
            if not reading.rows:
                await self._tell(table, reading)
        while waiting:
            deadline = min(self._state.deadlines[table] for table in waiting)
            if await self._is_passed(moment, deadline):
                break
            late = [table for table in waiting if self._state.deadlines[table] == deadline]
            await self._give_up(dict.fromkeys(late, "nothing proves that the source has passed what was read"))
            waiting = [table for table in waiting if table not in late]
        for table in waiting:
            await self._tell(table, readings[table])

    async def _try(self, table: str) -> _Reading | str:
        """Look at a table; why it cannot be repaired, if it cannot."""
        try:
            async with asyncio.timeout_at(self._state.deadlines[table]):
                return await self._look(table)
        except (BrokerError, LeaseLostError, ForkError):
            raise
        except TimeoutError:
            return "it took too long"
        except Exception as error:  # whatever it is, it does not end the reading of the source
            return str(error) if isinstance(error, BridgeError | _UnprovableError) else type(error).__name__

    async def _look(self, table: str) -> _Reading:
        """Compare a table with what was told of it, and read whole what differs."""
        touched = self._rows.touched[table]
        proven_until = (await self._broker.head()).proven_until
        relation = await self._relation(table, proven_until)
        too_large = f"it has, or had, more than {self._limits.rows} rows"
        told = await self._broker.fields(table, most=self._limits.rows + MOST_CHANGED)
        if told is None:
            raise _UnprovableError(too_large)
        seen: set[str] = set()
        wanted: list[str] = []
        async with aclosing(self._reader.pages(relation)) as pages:
            async for page in pages:
                fields = _fields(relation, page.rows)
                seen |= fields.keys()
                if len(seen) > self._limits.rows:
                    raise _UnprovableError(too_large)
                texts = await self._broker.rows(table, list(fields))
                wanted += [
                    name
                    for (name, row), text in zip(fields.items(), texts, strict=True)
                    if text is None or self._differs(relation, text, row)
                ]
        wanted += [name for name in told if name not in seen]
        if len(wanted) > MOST_CHANGED:
            raise _UnprovableError(f"more than {MOST_CHANGED} of its rows have changed")
        return _Reading(relation, touched, int(proven_until * 1_000_000), await self._read(relation, wanted))

    async def _relation(self, table: str, proven_until: float) -> Relation:
        """How a table's rows are laid out, if all of them are known as they were told, up to the last proof."""
        note = Note.decode((await self._broker.rows(table, [NOTE]))[0])
        described = await self._reader.describe(table)
        relation = described if note is None else note.relation
        if relation is not None and not relation.key:
            raise _UnprovableError("it has no primary key")
        if relation is not None and self._limits.column not in relation.index:
            raise _UnprovableError(f"it has no column {self._limits.column}")
        if note is None or not note.whole_at:
            raise _UnprovableError("not all of its rows are in the row index")
        if described is not None and _layout(described) != _layout(note.relation):
            raise _UnprovableError("its columns have changed")
        if (await self._broker.indexed())[table].left_out:
            raise _UnprovableError("the row index has no room for all of its rows")
        if note.whole_at > proven_until:
            raise _UnprovableError("its rows were read after the last proof that none of its changes was missing")
        return note.relation

    async def _read(self, relation: Relation, wanted: Sequence[str]) -> dict[str, Image | None]:
        """The rows of some fields as they stand now."""
        rows: dict[str, Image | None] = dict.fromkeys(wanted)
        size = 0
        for start in range(0, len(wanted), _KEYS_AT_ONCE):
            keys = [orjson.loads(name) for name in wanted[start : start + _KEYS_AT_ONCE]]
            found = await self._reader.rows(relation, keys)
            size += sum(len(value) for row in found for value in row if isinstance(value, str))
            if size > MOST_BYTES:
                raise _UnprovableError("too much of it has changed")
            if any(ABSENT in row for row in found):
                raise _UnprovableError("it has values that cannot be read back")
            rows |= _fields(relation, found)
        return rows

    async def _is_passed(self, moment: float, deadline: float) -> bool:
        """Wait until everything that was committed before is appended; False if that takes too long."""
        try:
            async with asyncio.timeout_at(deadline):
                while self._proven_until is None or self._proven_until < moment:
                    self._proved.clear()
                    await self._proved.wait()
        except TimeoutError:
            return False
        return True

    async def _tell(self, table: str, reading: _Reading) -> None:
        """Append what was read back, and be done with the table, unless it is doubted again meanwhile."""
        relation = reading.relation
        names = sorted(reading.rows, key=lambda name: self._order(relation, reading.rows[name]))
        told = self._told.get(table)
        if told is None or told.relation != relation or len(told.rows) > MOST_CHANGED:
            told = self._told[table] = _Told(relation, {})
        count = 0
        for start in range(0, len(names) or 1, _TOLD_AT_ONCE):
            async with self._rows.turn:
                if self._rows.touched.get(table) is not reading.touched:
                    return
                changes = await self._changes(reading, names[start : start + _TOLD_AT_ONCE])
                await self._append([*([] if start else [_resync(table, reading.since)]), *changes])
                told.rows.update(_fields(relation, [short(c.new) for c in changes if c.new is not None]))
                count += len(changes)
                self._state.told += len(changes)
        if self._rows.touched.get(table) is reading.touched:
            self._settle(table)
            self._state.problems.pop(table, None)
            logger.info("read back after a gap", extra={"table": table, "changes": count})

    async def _changes(self, reading: _Reading, names: Sequence[str]) -> list[Change]:
        """What makes of what was told what was read, of rows of which no live change has told. In the turn only."""
        relation = reading.relation
        names = [name for name in names if name not in reading.touched]
        now = time.time_ns() // 1000
        changes = []
        for name, text in zip(names, await self._broker.rows(relation.name, names), strict=True):
            row = reading.rows[name]
            if row is None and text is not None:
                old = _key_only(relation, orjson.loads(name))
                changes.append(Change("DELETE", relation, old, None, now, "repair", repaired=True))
            elif row is not None and (text is None or self._differs(relation, text, row)):
                operation: Operation = "INSERT" if text is None else "UPDATE"
                changes.append(Change(operation, relation, None, row, now, "repair", repaired=True))
        return changes

    async def _give_up(self, problems: Mapping[str, str]) -> None:
        """Tell tables as a resync."""
        for table, problem in problems.items():
            if self._state.problems.get(table) != problem:
                logger.warning("not read back after a gap", extra={"table": table, "reason": problem})
        self._state.problems |= problems
        names = ["*"] if problems.keys() >= set(self._rows.tables) else sorted(problems)
        async with self._rows.turn:
            for table in problems:
                self._settle(table)
                self._told.pop(table, None)
            await self._append([_resync(name) for name in names])
        self._state.resyncs += len(names)

    async def _append(self, bodies: Sequence[Body]) -> None:
        completed, changes = await self._rows.complete(bodies)
        await self._broker.append(self._token, completed, rows=changes)

    def _settle(self, table: str) -> None:
        self._rows.touched.pop(table, None)
        self._state.deadlines.pop(table, None)

    def _differs(self, relation: Relation, text: bytes, row: Image) -> bool:
        told = decode_row(text)
        return told is None or is_incomplete(text) or differs(relation, self._limits.column, told, row)

    def _order(self, relation: Relation, row: Image | None) -> OrderKey:
        return () if row is None else version(relation, self._limits.column, row)


def _resync(table: str, since: int | None = None) -> Control:
    return Control("resync", table, "upstream_gap", commit_time=time.time_ns() // 1000, since=since)


def _layout(relation: Relation) -> tuple[list[str], tuple[int, ...]]:
    return [column.name for column in relation.columns], relation.key


def _key_only(relation: Relation, key: Sequence[str]) -> Image:
    texts = dict(zip(relation.key, key, strict=True))
    return tuple(texts.get(i, ABSENT) for i in range(len(relation.columns)))


def _fields(relation: Relation, rows: Sequence[Image]) -> dict[str, Image]:
    """Rows by their fields."""
    fields = {field_of(relation, row): row for row in rows}
    if None in fields:
        raise _UnprovableError("it has rows without their key")
    return {name: row for name, row in fields.items() if name is not None}
