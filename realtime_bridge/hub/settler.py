"""Learns what must be known of members before anything is decided for their readers.

A reader whose member is pending waits here, and all that wait are asked about at once: whoever comes alone without
delay, and while many come, as many as one question holds. What a member sees by what was learned is then compared
with what the broker remembers of the user, whichever process served it last: so a reader that comes from a time when
the user saw otherwise is told so.

Layer: core. May import: words, broker.base, policy.base, hub.standing.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Final

from realtime_bridge.broker.base import SIGHT_SECONDS, Broker, Sight
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BrokerError
from realtime_bridge.hub.standing import Standing
from realtime_bridge.policy.base import Member, Seen

logger = logging.getLogger(__name__)

MOST_AT_ONCE: Final = 1000
"""Members asked about together."""
RECALLED_AT_ONCE: Final = 100
"""Members compared together, and then served: more would hold up whoever is served already."""
GATHER_SECONDS: Final = 0.05
MANY: Final = 5
"""So many who come within `GATHER_SECONDS` are waited for, and those who come after them."""
GATHER_MOST_SECONDS: Final = 2.5
"""For no longer than that: what a reader may have to wait because others come."""
REMIND_SECONDS: Final = SIGHT_SECONDS * 0.3
"""So often the broker is told again of what present members see."""
_RETRY_SECONDS: Final = 0.5


class Settler:
    """Settles members: loads them, and learns since when they see what they see."""

    def __init__(self, standing: Standing, broker: Broker) -> None:
        self._standing = standing
        self._broker = broker
        self._waiting: dict[Member, asyncio.Future[None]] = {}
        self._news = asyncio.Event()

    def is_settled(self, member: Member) -> bool:
        """Whether its readers may be served now."""
        return member.compared and not member.pending and member not in self._waiting

    def settle(self, member: Member) -> asyncio.Future[None]:
        """Have a member settled; the future is done once it was. It may be in doubt again by then."""
        future = self._waiting.get(member)
        if future is None:
            future = self._waiting[member] = asyncio.get_running_loop().create_future()
            self._news.set()
        return future

    async def work(self) -> None:
        """Settle whoever waits, for ever: at once, but for those who have come while others were being settled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._settle(list(islice(self._waiting, MOST_AT_ONCE)))
                await self._gather()

    async def _gather(self) -> None:
        """Wait while many come, so that 5,000 who lost their links together are no more than a few questions."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + GATHER_MOST_SECONDS
        before = 0
        while before < len(self._waiting) < MOST_AT_ONCE and loop.time() < ends:
            before = len(self._waiting) + MANY - 1
            await asyncio.sleep(GATHER_SECONDS)

    async def remind(self) -> None:
        """Tell the broker again of what present members see, from time to time, for ever."""
        while True:
            await asyncio.sleep(REMIND_SECONDS)
            present = {connection.member for connection in self._standing.connections}
            settled = iter([member for member in present if self.is_settled(member)])
            while members := list(islice(settled, RECALLED_AT_ONCE)):
                try:
                    await self._tell(members)  # what is answered is for those who come; these were told of all since
                except BrokerError:
                    break

    async def _settle(self, members: Sequence[Member]) -> None:
        await self._standing.policy.load(members)
        known = iter([member for member in members if not member.pending])
        while some := [member for member in islice(known, RECALLED_AT_ONCE) if not member.pending]:
            try:
                await self._recall(some)
            except BrokerError:  # until it answers, nobody knows whether their copies are right
                await asyncio.sleep(_RETRY_SECONDS)
                return
            for member in some:
                member.compared = True
                future = self._waiting.pop(member)
                if not future.done():
                    future.set_result(None)

    async def _recall(self, members: Collection[Member]) -> None:
        """Raises `BrokerError`."""
        found = await self._tell(members)
        known = {(member, table) for member, table, *_ in found}
        for member in members:
            member.unknown = {table for table in self._standing.tables if (member, table) not in known}
        for member, table, digest, doubt, since in found:
            before = member.sights.get(table)
            is_as_before = before is not None and before.digest == digest and not doubt
            member.sights[table] = Seen(digest, before.since if before and is_as_before else since, since)
            if doubt and member.doubts.get(table) == doubt and not member.pending:
                del member.doubts[table]
                member.confirmed.add(table)

    async def _tell(self, members: Iterable[Member]) -> list[tuple[Member, str, str, int, int]]:
        """Tell the broker what members see: member, table, digest, the doubt that it answers, and since when.

        Raises:
            BrokerError: it cannot be told now.
        """
        policy, tables, number = self._standing.policy, self._standing.tables, self._standing.number
        known = [(m, t, digest, m.doubts.get(t, 0)) for m in members for t in tables if (digest := policy.digest(m, t))]
        found = await self._broker.recall(self._standing.epoch, [_sight(*what, number) for what in known])
        return [(*what, since) for what, since in zip(known, found, strict=True)]


def user_of(claims: Claims) -> str:
    """The word by which the broker knows a user: the same for all its tokens of a role."""
    return f"{claims.role}:{claims.user}"


def _sight(member: Member, table: str, digest: str, doubt: int, number: int) -> Sight:
    """What a member sees of a table.

    Where an entry has put it in doubt, a change is that entry's. Where that entry changed nothing, what it told may
    have been known here before, read at some time before it came: unless that was read because of an entry, too.
    """
    least = 0 if table in member.confirmed else doubt
    before = member.sights[table].digest if doubt and table in member.sights else ""
    return Sight(user_of(member.claims), table, digest, doubt or None, least, before, number)
