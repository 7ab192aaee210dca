"""The members that are known: those present, and for a while those who have left, since most come back.

Layer: adapters (it does no I/O). May import: words, policy.base, policy.doubts.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from realtime_bridge.claims import Claims
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.doubts import names_of

ABSENT_SECONDS: Final = 60.0
"""For so long what is known of a member is kept after it has left: a long poll comes back, and so does a page."""
MOST_ABSENT: Final = 10_000


class Members:
    """The known members by what policies can tell them apart by.

    Args:
        clock: seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str], Member] = {}
        self._by_name: dict[str, set[Member]] = {}
        self._absent: OrderedDict[Member, float] = OrderedDict()
        self._expiring: OrderedDict[Member, float] = OrderedDict()

    def __iter__(self) -> Iterator[Member]:
        """All of them, also the absent ones; they may come and go meanwhile."""
        return iter(tuple(self._known.values()))

    def __contains__(self, member: Member) -> bool:
        return self._known.get(member.key) is member

    @property
    def present(self) -> int:
        """How many are in use."""
        return len(self._known) - len(self._absent)

    @property
    def expiring(self) -> bool:
        """Whether what is known of anybody has expired."""
        return bool(self._expiring) and next(iter(self._expiring.values())) < self._clock()

    def get(self, key: tuple[str, str]) -> Member | None:
        """A known member, in use from now on; None if there is none. It is pending if what is known has expired."""
        member = self._known.get(key)
        if member is not None and member in self._absent:
            del self._absent[member]
            member.pending |= self.take_expired(member)
        return member

    def add(self, key: tuple[str, str], claims: Claims) -> Member:
        """A member that was not known."""
        member = self._known[key] = Member(key, claims)
        for name in names_of(claims.values):
            self._by_name.setdefault(name, set()).add(member)
        return member

    def rest(self, member: Member) -> None:
        """A member is not in use any more."""
        self._absent[member] = self._clock()
        oldest = self._clock() - ABSENT_SECONDS
        while self._absent:
            first, left_at = next(iter(self._absent.items()))
            if left_at >= oldest and len(self._absent) <= MOST_ABSENT:
                break
            self.forget(first)

    def forget(self, member: Member) -> None:
        """Forget a member, present or not."""
        if member not in self:
            return
        del self._known[member.key]
        self._absent.pop(member, None)
        self._expiring.pop(member, None)
        for name in names_of(member.claims.values):
            self._by_name[name].discard(member)
            if not self._by_name[name]:
                del self._by_name[name]

    def named(self, names: Iterable[str]) -> Iterator[Member]:
        """Those whose `auth.uid()` or `auth.email()` is one of these."""
        for name in names:
            yield from tuple(self._by_name.get(name, ()))

    def expire(self, member: Member, seconds: float) -> None:
        """What is known of a member holds for so long from now; for all members the same."""
        self._expiring.pop(member, None)
        self._expiring[member] = self._clock() + seconds

    def has_expired(self, member: Member) -> bool:
        """Whether what is known of one member has expired, and nobody was told of that."""
        ends = self._expiring.get(member)
        return ends is not None and ends < self._clock()

    def take_expired(self, member: Member) -> bool:
        """The same, but somebody is told of it now."""
        has_expired = self.has_expired(member)
        if has_expired:
            del self._expiring[member]
        return has_expired

    def expired(self) -> list[Member]:
        """Those of whom what is known has expired since the last call."""
        found: list[Member] = []
        now = self._clock()
        while self._expiring:
            member, ends = next(iter(self._expiring.items()))
            if ends >= now:
                break
            del self._expiring[member]
            found.append(member)
        return found
