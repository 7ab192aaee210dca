"""The engine under test, behind the few calls that the comparison needs."""

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple, Self

from realtime_bridge.change import ABSENT, Change, Entry
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.base import Member, Verdict
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from tests.differential.world import ROLES

RULES: Final[Mapping[str, str]] = {
    "public.unprotected": "true",
    "public.ruled": "owner = auth.uid() or kind in ('a', 'ß') or exists (select 1 from app.members m "
    "where m.user_id = auth.uid() and m.org_id = ruled.org_id)",
}
"""What BRIDGE_POLICIES would say: for a table without row-level security, and one that says what its policy says."""


FACT_SECONDS: Final = 3600.0
"""Longer than a comparison takes: nothing that is known of users changes meanwhile."""


class Decided(NamedTuple):
    """Numbers of the users who see the old and the new image, and of those for whom one of them is not known."""

    old: set[int]
    new: set[int]
    unknown: set[int]

    def add(self, verdict: Verdict, users: set[int]) -> None:
        for images, sees in ((self.old, verdict.old), (self.new, verdict.new), (self.unknown, None in verdict)):
            if sees:
                images |= users


@dataclass
class Engine:
    """A loaded engine and the users who have joined it."""

    policy: PolicyEngine
    members: list[Member]

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, tables: Sequence[str], users: Sequence[Claims]) -> AsyncIterator[Self]:
        async with Database(dsn) as database:
            rules = {table: rule for table, rule in RULES.items() if table in tables}
            asking = Asking(database.transaction, ROLES)
            policy = PolicyEngine(
                tables, ROLES, rules, Catalog(database.transaction), asking, fact_seconds=FACT_SECONDS
            )
            await policy.prepare()
            members = [policy.join(user) for user in users]
            await policy.load(members)
            yield cls(policy, members)

    async def audiences(self, changes: Sequence[Change]) -> list[Decided]:
        """What is decided for all users at once, as it is for those who stand at the end."""
        decided: list[Decided] = []
        for _, of_table in groupby(changes, key=lambda change: change.relation.name):
            decided += await self._audiences(list(of_table))
        return decided

    async def _audiences(self, changes: Sequence[Change]) -> list[Decided]:
        """Whom a change puts in doubt is loaded, and asked for alone from that change on, as the hub does it."""
        answers = await self.policy.audience(entries(changes))
        decided = [Decided(*map(self._users, (a.old, a.new, a.unknown))) for a in answers]
        doubted: dict[Member, int] = {}
        for place, answer in enumerate(answers):
            doubted = dict.fromkeys(answer.doubtful, place) | doubted
        await self.policy.load(list(doubted))
        for member, place in doubted.items():
            users = self._users({member})
            verdicts = await self.policy.verdicts(entries(changes[place:]), member)
            for found, verdict in zip(decided[place:], verdicts, strict=True):
                found.add(verdict, users)
        return decided

    def _users(self, members: Set[Member]) -> set[int]:
        return {number for number, member in enumerate(self.members) if member in members}

    async def verdicts(self, changes: Sequence[Change]) -> list[Decided]:
        """What is decided for one user after another, as it is for those who read on from a position."""
        decided = [Decided(set(), set(), set()) for _ in changes]
        for user, member in enumerate(self.members):
            for answer, verdict in zip(decided, await self.policy.verdicts(entries(changes), member), strict=True):
                answer.add(verdict, {user})
        return decided

    @property
    def asked(self) -> int:
        """How many conditions on a row Postgres was asked to decide; all else was decided in memory."""
        return self.policy.knowledge.asked

    def misreads(self, number: int) -> bool:
        """Whether a user has a claim whose text only Postgres knows; such a user is shown nothing that rests on it."""
        return ABSENT in self.members[number].facts.values()

    def refuses(self, table: str, user: Claims) -> bool:
        """Whether nobody of this user's role gets anything of a table."""
        return self.policy.refusal(table, user) is not None


def entries(changes: Sequence[Change]) -> list[Entry]:
    """Changes as the history numbers them."""
    return [Entry(number, str(number), str(number - 1), change) for number, change in enumerate(changes, 1)]
