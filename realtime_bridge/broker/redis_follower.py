"""Following the history in Redis: notifications while they fit together, the history itself when they do not.

Pub/sub carries what is new, but promises nothing: a notification may be lost, late, or of a branch of the history that
a failover has cut off. Numbers and ids tell; whenever they do not continue what the follower has, and whenever it has
heard nothing for half a second, it asks. So it knows of a Redis that is gone or frozen within three.

Layer: adapters. May import: change, errors, broker.base, broker.redis_link, broker.redis_history.
Sources: the notification's form is `notify` in lua/common.lua.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Self

from realtime_bridge.broker.base import Update
from realtime_bridge.broker.redis_history import RawEntry, RedisHistory, View
from realtime_bridge.broker.redis_link import Subscription
from realtime_bridge.change import Entry
from realtime_bridge.errors import BrokerError, HistoryGoneError

QUIET_SECONDS: Final = 0.5
PONG_SECONDS: Final = 2.0
READ_ENTRIES: Final = 500
READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Notification:
    """What an append tells.

    Attributes:
        start: the first new number.
        count: of the new entries; 0 if only the proof is new.
        entries: empty if there are so many bytes of them that they have to be read.
    """

    epoch: str
    start: int
    count: int
    previous: str
    nonce: str
    proven_until: float
    entries: tuple[RawEntry, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read what `notify` in lua/common.lua writes."""
        header, _, bodies = data.partition(b"\n")
        epoch, start_text, count, previous, nonce, proven, *lengths = header.decode().split(" ")
        previous = "" if previous == "-" else previous
        start = int(start_text)
        entries, offset, before = [], 0, previous
        for ordinal, length in enumerate(int(text) for text in lengths if text):
            own = f"{nonce}.{ordinal}"
            entries.append(RawEntry(start + ordinal, own, before, bodies[offset : offset + length]))
            offset, before = offset + length, own
        return cls(epoch, start, int(count), previous, nonce, float(proven), tuple(entries))

    @property
    def number(self) -> int:
        """The newest number after it."""
        return self.start + self.count - 1

    @property
    def id(self) -> str:
        """The newest entry's id after it."""
        return f"{self.nonce}.{self.count - 1}" if self.count else self.previous


def _parse(data: bytes | None) -> Notification | None:
    """A notification; None for silence, and for what a later version of the bridge may write."""
    try:
        return None if data is None else Notification.parse(data)
    except ValueError:
        return None


class Follower:
    """One reader at the end of the history.

    Attributes:
        id: of the newest entry seen; None if nobody remembers it.
    """

    def __init__(self, history: RedisHistory, subscription: Subscription, view: View) -> None:
        self._history = history
        self._subscription = subscription
        self.epoch = view.head.epoch
        self.number = view.head.number
        self.id: str | None = view.head.id
        self._proven_until = view.head.proven_until
        self._pinged_at: float | None = None

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield updates for ever; see `Broker.follow`."""
        yield self._update()
        while True:
            data = await self._subscription.next(QUIET_SECONDS)
            if data is None:
                await self._ping()
            else:
                self._pinged_at = None
            if data == b"":
                continue
            notification = _parse(data)
            if notification is not None and self._continues(notification):
                self._proven_until = notification.proven_until
                yield await self._take(notification.entries)
            elif notification is None or not self._is_known(notification):
                async for update in self._catch_up():
                    yield update

    def _continues(self, notification: Notification) -> bool:
        return (
            notification.epoch == self.epoch
            and notification.start == self.number + 1
            and self.id in (None, notification.previous)
            and len(notification.entries) == notification.count
        )

    def _is_known(self, notification: Notification) -> bool:
        """Whether it came late: its entries have been read already."""
        known = self._history.trail.id_of(notification.number)
        return notification.epoch == self.epoch and notification.number <= self.number and known == notification.id

    async def _ping(self) -> None:
        """Ask the connection itself for a sign of life; a silent one may be frozen while Redis is well."""
        now = time.monotonic()
        if self._pinged_at is None:
            self._pinged_at = now
            await self._subscription.ping()
        elif now - self._pinged_at >= PONG_SECONDS:
            raise BrokerError("Redis: the notification connection is dead")

    async def _catch_up(self) -> AsyncGenerator[Update, None]:
        """Ask where the history ends, and read up to there. What is proven of the end is told only there."""
        view = await self._history.view()
        if view.head.epoch != self.epoch:
            yield await self._change_epoch(view)
        while self.number < view.head.number:
            raw, trimmed = await self._read()
            if raw and self.id in (None, raw[0].previous):
                yield await self._take(raw)
                continue
            view = await self._history.view()
            if view.head.epoch != self.epoch:
                yield await self._change_epoch(view)
            elif raw or trimmed:
                yield self._lose(view)
        self._proven_until = view.head.proven_until
        yield self._update()

    async def _read(self) -> tuple[list[RawEntry], bool]:
        """What follows, and whether it is trimmed."""
        try:
            return await self._history.read(self.number, limit=READ_ENTRIES, max_bytes=READ_BYTES), False
        except HistoryGoneError:
            return [], True

    async def _take(self, raw: Sequence[RawEntry]) -> Update:
        entries = await self._history.decode(raw)
        if raw:
            trail = self._history.trail
            if trail.epoch == self.epoch:
                trail.extend(raw[0].number, raw[0].previous, [entry.id for entry in raw])
            self.number, self.id = raw[-1].number, raw[-1].id
        return self._update(tuple(entries))

    async def _change_epoch(self, view: View) -> Update:
        common = view.lineage.common(self.epoch)
        if common is None:
            return self._lose(view)
        self.epoch = view.head.epoch
        if common < self.number:
            self.number, self.id = common, await self._history.id_of(common)
            self._proven_until = 0.0
        return Update("fork", self.epoch, self.number, (), self._proven_until)

    def _lose(self, view: View) -> Update:
        head = view.head
        self.epoch, self.number, self.id, self._proven_until = head.epoch, head.number, head.id, head.proven_until
        return Update("lost", self.epoch, self.number, (), self._proven_until)

    def _update(self, entries: tuple[Entry, ...] = ()) -> Update:
        return Update("entries", self.epoch, self.number, entries, self._proven_until)
