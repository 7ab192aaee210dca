"""Broker kept in the memory of one process: no service to run, and nothing survives the process.

Layer: adapters. May import: change, errors, broker.base.
"""

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal, NoReturn, Self

from realtime_bridge.broker.base import (
    FIELD_BYTES,
    MOST_SIGHTS,
    NOTE,
    SIGHT_SECONDS,
    SIGHTS_OF_A_TABLE,
    Head,
    IndexedTable,
    RowChange,
    Sight,
    Update,
)
from realtime_bridge.change import Body, Entry, Position, encode_body
from realtime_bridge.errors import BrokerError, HistoryGoneError, LeaseLostError

QUIET_SECONDS: Final = 1.0
READ_ENTRIES: Final = 500


@dataclass(frozen=True, slots=True)
class _Held:
    entry: Entry
    time: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """A digest: since which number nothing else can have been in use, and when it was last told of."""

    since: int
    told_at: float


class _RowIndex:
    """Texts by table and field; see `RowChange`. It never gets larger than `most` by a new field, but for the notes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
        self._tables: defaultdict[str, IndexedTable] = defaultdict(lambda: IndexedTable(0, 0))

    def rows(self, table: str, fields: Sequence[str]) -> list[bytes | None]:
        texts = self._texts.get(table, {})
        return [texts.get(field) for field in fields]

    def fields(self, table: str) -> list[str]:
        return [field for field in self._texts.get(table, {}) if field != NOTE]

    def indexed(self) -> dict[str, IndexedTable]:
        return {name: table for name, table in self._tables.items() if any(table)}

    def change(self, change: RowChange) -> None:
        if change.field is None:
            self._texts.pop(change.table, None)
            self._tables.pop(change.table, None)
            return
        texts, (size, left_out) = self._texts[change.table], self._tables[change.table]
        before = texts.get(change.field)
        if before is not None and change.only_new:
            return
        growth = _cost(change.field, change.text) - _cost(change.field, before)
        if change.text is None:
            texts.pop(change.field, None)
        elif before is None and change.field != NOTE and self._size + growth > self._most:
            left_out, growth = left_out + 1, 0
        else:
            texts[change.field] = change.text
        self._tables[change.table] = IndexedTable(size + growth, left_out)

    @property
    def _size(self) -> int:
        return sum(table.size for table in self._tables.values())


def _cost(field: str, text: bytes | None) -> int:
    return 0 if text is None else len(field.encode()) + len(text) + FIELD_BYTES


class MemoryBroker:
    """Broker of one process. An instance belongs to one event loop.

    Args:
        history_size: entries kept.
        history_bytes: bytes of encoded bodies kept.
        history_seconds: age of the oldest entry kept. Trimmed by appends, empty ones too.
        row_index_bytes: bound of the row index.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        history_size: int,
        history_bytes: int,
        history_seconds: float,
        row_index_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._size = history_size
        self._most_bytes = history_bytes
        self._seconds = history_seconds
        self._clock = clock
        self._index = _RowIndex(row_index_bytes)
        self._epoch = secrets.token_hex(4)
        self._held: dict[int, _Held] = {}
        self._bytes = 0
        self._number = 0
        self._id = ""
        self._time = 0.0
        self._watermark = ""
        self._proven_until = 0.0
        self._sights: dict[tuple[str, str], dict[str, _Seen]] = {}  # told of longest ago first; so are the digests
        self._token = ""
        self._counter = 0
        self._lease_ends = 0.0
        self._appended = asyncio.Event()
        self._lease_changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    # -- lease -------------------------------------------------------------------------------------------------------

    async def acquire_lease(self, *, ttl: float) -> str:
        """See `Broker.acquire_lease`."""
        while (remaining := self._lease_ends - time.monotonic()) > 0:
            await _wait(self._lease_changed, remaining)
        self._counter += 1
        self._token = f"{self._epoch}.{self._counter}.{secrets.token_hex(8)}"
        self._lease_ends = time.monotonic() + ttl
        return self._token

    async def keep_lease(self, token: str, *, ttl: float) -> NoReturn:
        """See `Broker.keep_lease`."""
        while True:
            if token != self._token or time.monotonic() >= self._lease_ends:
                raise LeaseLostError("another leads, or the lease has run out")
            self._lease_ends = time.monotonic() + ttl
            await asyncio.sleep(ttl / 3)

    async def release_lease(self, token: str) -> None:
        """See `Broker.release_lease`."""
        if token == self._token:
            self._token = ""
            self._lease_ends = 0.0
            self._lease_changed = _wake(self._lease_changed)

    # -- history -----------------------------------------------------------------------------------------------------

    async def append(
        self,
        token: str,
        bodies: Sequence[Body],
        *,
        watermark: str = "",
        proven_until: float | None = None,
        rows: Sequence[RowChange] = (),
    ) -> Head:
        """See `Broker.append`."""
        assert len(bodies) <= 1000
        if token != self._token:
            raise LeaseLostError("another leads")
        self._time = max(self._time, self._clock())
        nonce = secrets.token_hex(6)
        for ordinal, body in enumerate(bodies):
            entry = Entry(self._number + 1, f"{nonce}.{ordinal}", self._id, body, len(encode_body(body)))
            self._held[entry.number] = _Held(entry, self._time)
            self._bytes += entry.size
            self._number, self._id = entry.number, entry.id
        self._trim(keep=len(bodies))
        for change in rows:
            self._index.change(change)
        self._watermark = watermark or self._watermark
        if proven_until is not None:
            self._proven_until = proven_until
        self._appended = _wake(self._appended)
        return self._head()

    def _trim(self, keep: int) -> None:
        oldest_time = self._time - self._seconds
        while len(self._held) > keep:
            oldest = self._held[self._first]
            if len(self._held) <= self._size and self._bytes <= self._most_bytes and oldest.time >= oldest_time:
                return
            self._bytes -= oldest.entry.size
            del self._held[self._first]

    @property
    def _first(self) -> int:
        return self._number - len(self._held) + 1

    async def rows(self, table: str, fields: Sequence[str]) -> list[bytes | None]:
        """See `Broker.rows`."""
        return self._index.rows(table, fields)

    async def fields(self, table: str, *, most: int) -> list[str] | None:
        """See `Broker.fields`."""
        fields = self._index.fields(table)
        return fields if len(fields) <= most else None

    async def indexed(self) -> dict[str, IndexedTable]:
        """See `Broker.indexed`."""
        return self._index.indexed()

    async def watermark(self) -> str | None:
        """See `Broker.watermark`."""
        return self._watermark or None

    async def head(self) -> Head:
        """See `Broker.head`."""
        return self._head()

    def _head(self) -> Head:
        return Head(self._epoch, self._number, self._id, self._first, self._proven_until)

    async def locate(self, position: Position) -> int:
        """See `Broker.locate`."""
        if position.epoch != self._epoch:
            raise HistoryGoneError("the position is of an unknown epoch")
        if position.number > self._number:
            raise HistoryGoneError("the position is beyond the end of the history")
        if position.number < self._first - 1:
            raise HistoryGoneError("what follows the position is trimmed")
        return position.number

    async def recall(self, epoch: str, sights: Sequence[Sight]) -> list[int]:
        """See `Broker.recall`."""
        if epoch != self._epoch:
            raise BrokerError("the history is another than that in which users were looked at")
        now = self._clock()
        while self._sights:
            key, seen = next(iter(self._sights.items()))
            if len(self._sights) <= MOST_SIGHTS and max(s.told_at for s in seen.values()) >= now - self._seconds:
                break
            del self._sights[key]
        return [self._recall(sight, now) for sight in sights]

    def _recall(self, sight: Sight, now: float) -> int:
        known = self._sights.pop((sight.user, sight.table), {})
        # A clock can be set back.
        seen = {digest: _Seen(other.since, min(other.told_at, now)) for digest, other in known.items()}
        self._sights[sight.user, sight.table] = seen
        following = self._number + 1
        own = seen.get(sight.digest)
        ended = None if sight.before == sight.digest else seen.get(sight.before)
        told_at = own.told_at if own else now
        told_later = takewhile(lambda digest: digest != sight.digest, reversed(seen))
        is_news = own is None or not all(_are_rivals(digest, sight.digest) for digest in told_later)
        is_in_doubt = any(
            _are_rivals(digest, sight.digest) and other.told_at + SIGHT_SECONDS > told_at
            for digest, other in seen.items()
            if digest != sight.before
        )
        if not seen:
            since = sight.number
        elif is_in_doubt:
            since = following
        else:
            since = own.since if own else 0
            if is_news or ended:
                since = max(since, following if sight.changed is None else sight.changed)
        since = min(max(since, sight.least), following)
        seen.pop(sight.digest, None)
        seen.pop(sight.before, None)
        seen[sight.digest] = _Seen(since, now)
        if len(seen) > SIGHTS_OF_A_TABLE:
            del seen[next(iter(seen))]
        return since

    async def read(self, after: int, *, limit: int = 500, max_bytes: int = 1 << 20) -> list[Entry]:
        """See `Broker.read`."""
        if after < self._first - 1:
            raise HistoryGoneError(f"entry {after + 1} is trimmed")
        entries: list[Entry] = []
        for number in range(after + 1, min(after + limit, self._number) + 1):
            entry = self._held[number].entry
            max_bytes -= entry.size
            if max_bytes < 0 and entries:
                break
            entries.append(entry)
        return entries

    @asynccontextmanager
    async def follow(self) -> AsyncGenerator[AsyncIterator[Update], None]:
        """See `Broker.follow`."""
        async with aclosing(self._updates(self._number)) as updates:
            yield updates

    async def _updates(self, number: int) -> AsyncGenerator[Update, None]:
        appended, proven_until = self._appended, self._proven_until
        yield Update("entries", self._epoch, number, (), proven_until)
        while True:
            if number == self._number:
                await _wait(appended, QUIET_SECONDS)
            appended = self._appended
            kind: Literal["entries", "lost"] = "entries"
            entries: list[Entry] = []
            try:
                entries = await self.read(number, limit=READ_ENTRIES)
                number += len(entries)
            except HistoryGoneError:
                kind, number = "lost", self._number
            if number == self._number:  # what is proven of the end is told only there
                proven_until = self._proven_until
            yield Update(kind, self._epoch, number, tuple(entries), proven_until)


def _are_rivals(one: str, other: str) -> bool:
    """Whether two digests can be in use at the same time: see `Sight`."""
    (rights, alone), (other_rights, other_alone) = _parts(one), _parts(other)
    return rights == other_rights and alone != other_alone


def _parts(digest: str) -> tuple[str, str]:
    rights, _, rest = digest.partition(".")
    return rights, rest.partition(".")[0]


async def _wait(event: asyncio.Event, timeout: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


def _wake(event: asyncio.Event) -> asyncio.Event:
    """Wake all who wait, and return the event that they may wait for next."""
    event.set()
    return asyncio.Event()
