"""The history in Redis: reading it, and finding out whether it is still the one this process has seen.

Every question to Redis carries what the process has seen last, so that whoever comes first after a failover that lost
entries finds the fork, and makes the one new epoch that tells everybody else.

Layer: adapters. May import: change, errors, broker.base, broker.redis_link, broker.trail.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from realtime_bridge.broker.base import Head
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.trail import Lineage, Trail
from realtime_bridge.change import Body, Control, Entry, Relation, decode_body
from realtime_bridge.errors import BrokerError, HistoryGoneError

logger = logging.getLogger(__name__)

_RELATIONS_KEPT: Final = 1024
_TRIES: Final = 5


class RawEntry(NamedTuple):
    """An entry whose body is not decoded yet."""

    number: int
    id: str
    previous: str
    body: bytes


@dataclass(frozen=True, slots=True)
class View:
    """What Redis says of the history, consistent in itself."""

    head: Head
    watermark: str
    lineage: Lineage


def parse_head(answer: Sequence[Any]) -> tuple[str, Head]:
    """Read what the scripts' `head` returns: a status, and where the history ends."""
    status, epoch, number, newest_id, first, proven = answer[:6]
    return status.decode(), Head(epoch.decode(), number, newest_id.decode(), first, float(proven))


def _parse_lineage(epoch: str, items: Sequence[bytes]) -> Lineage:
    pairs = (item.decode().split(" ") for item in items)
    return Lineage(tuple((name, int(fork) if fork else None) for name, fork in pairs) or ((epoch, None),))


class RedisHistory:
    """Reads the history and keeps this process's trail.

    Attributes:
        trail: what this process appended or followed.
        undecodable: entries that this version of the bridge could not read; each is shown as a `resync` of all tables.
    """

    def __init__(self, link: Link) -> None:
        self.trail = Trail()
        self.undecodable = 0
        self._link = link
        self._epochs: frozenset[str] = frozenset()  # today's and those before it, as they were when it was last asked
        self._relations: dict[str, Relation] = {}
        self._turn = asyncio.Lock()
        self._asked = 0
        self._shared: View | BrokerError | None = None

    async def view(self) -> View:
        """Ask where the history ends. If it has forked, a new epoch stands and the trail goes back to the fork.

        Raises:
            BrokerError: Redis cannot be reached or refuses.
        """
        for _ in range(_TRIES):
            mark = self.trail.mark
            answer = await self._link.script("head", *mark)
            status, head = parse_head(answer)
            if self.trail.mark != mark and (status != "ok" or not self.trail.epoch):
                continue  # somebody else in this process has learned more meanwhile
            view = View(head, answer[6].decode(), _parse_lineage(head.epoch, answer[7]))
            if status == "fork":
                await self._fork(head)
            elif status == "epoch" and head.epoch in self._epochs:  # numbers beyond what is left of it mean nothing
                await self._link.script("fork", head.epoch, head.number, head.id)
            elif status == "epoch":
                self._adopt(view)
            else:
                self._epochs = frozenset(name for name, _ in view.lineage.epochs)
                if not self.trail.epoch:
                    self.trail.restart(head.epoch, head.number, [item.decode() for item in reversed(answer[8])])
                return view
        raise BrokerError("Redis: the history changes faster than it can be followed")

    async def shared_view(self) -> View:
        """A view no older than the call. All who wait share the next one, so that any number costs two at most.

        Raises:
            BrokerError: Redis cannot be reached or refuses.
        """
        asked_before = self._asked
        async with self._turn:
            if self._asked == asked_before or self._shared is None:
                self._asked += 1
                self._shared = None  # stays so if this one is cancelled: then the next asks
                try:
                    self._shared = await self.view()
                except BrokerError as error:
                    self._shared = error
            if isinstance(self._shared, BrokerError):
                raise BrokerError(str(self._shared)) from self._shared
            return self._shared

    async def read(self, after: int, *, limit: int, max_bytes: int) -> list[RawEntry]:
        """Read the entries after a number; see `Broker.read`."""
        newest, *flat = await self._link.sized_script("read", after, limit, most=max_bytes)
        numbers, ids, previous, bodies = flat[::4], flat[1::4], flat[2::4], flat[3::4]
        if after < newest and (not numbers or numbers[0] != after + 1):
            raise HistoryGoneError(f"entry {after + 1} is trimmed")
        return [
            RawEntry(number, own.decode(), before.decode(), body)
            for number, own, before, body in zip(numbers, ids, previous, bodies, strict=True)
        ]

    async def decode(self, raw: Sequence[RawEntry]) -> list[Entry]:
        """Decode bodies, asking Redis for relations that are not known yet."""
        return [
            Entry(entry.number, entry.id, entry.previous, await self._body(entry.body), len(entry.body))
            for entry in raw
        ]

    async def id_of(self, number: int) -> str | None:
        """An entry's id; None if neither this process nor Redis remembers it."""
        known = self.trail.id_of(number)
        if known is not None:
            return known
        found = await self._lookup(number)
        return found[0] if found else None

    async def _body(self, data: bytes) -> Body:
        try:
            while True:
                try:
                    return decode_body(data, self._relations)
                except KeyError as missing:
                    await self._learn(missing.args[0])
        except ValueError:
            # Written by a later version of the bridge, or its relation is lost: readers must not trust their copies.
            self.undecodable += 1
            return Control("resync", "*", "upstream_gap")

    async def _learn(self, version: str) -> None:
        data = await self._link.command("HGET", self._link.relations, version)
        if data is None:
            raise ValueError(f"relation {version} is missing")
        if len(self._relations) >= _RELATIONS_KEPT:
            del self._relations[next(iter(self._relations))]
        self._relations[version] = Relation.decode(data)

    def _adopt(self, view: View) -> None:
        """Go over to an epoch that somebody else has made."""
        head = view.head
        common = view.lineage.common(self.trail.epoch)
        logger.warning("history forked", extra={"epoch": head.epoch, "parent": self.trail.epoch, "number": common})
        if common is None or (common < self.trail.number and self.trail.id_of(common) is None):
            self.trail.forget()
        else:
            self.trail.rewind(head.epoch, common)

    async def _fork(self, head: Head) -> None:
        epoch, *_ = mark = self.trail.mark
        common = await self._last_common(head)
        if self.trail.mark != mark:
            return
        common_id = None if common is None else self.trail.id_of(common)
        if common is None or common_id is None:
            await self._link.script("fork", epoch, -1, "")
        else:
            await self._link.script("fork", epoch, common, common_id)

    async def _last_common(self, head: Head) -> int | None:
        """The highest number that the trail and Redis have in common; None if none can be proven."""
        trail = self.trail
        if trail.id_of(head.number) == head.id:
            return head.number
        low, high = max(head.first, trail.first), min(trail.number, head.number)
        if low > high:
            return None
        lowest = await self._lookup(low)
        if lowest is None:
            return None
        if lowest[0] != trail.id_of(low):
            return low - 1 if lowest[1] == trail.id_of(low - 1) else None
        while low < high:  # two branches have everything in common up to the fork, and nothing after it
            middle = (low + high + 1) // 2
            found = await self._lookup(middle)
            if found is not None and found[0] == trail.id_of(middle):
                low = middle
            else:
                high = middle - 1
        return low

    async def _lookup(self, number: int) -> tuple[str, str] | None:
        """An entry's id and its predecessor's; None if Redis does not hold it."""
        found = await self._link.script("ids", number)
        return (found[0].decode(), found[1].decode()) if found else None
