"""What one process remembers of the history, by which it recognises a fork.

A broker that fails over may come back without its newest entries, and may since have got others in their place.
Comparing numbers does not show that; comparing the ids of the newest entries does.

Layer: adapters (pure). May import: nothing of the package.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

Mark: TypeAlias = tuple[str, int, str]
"""Epoch, number and id of the newest entry that somebody has seen."""

IDS_KEPT: Final = 4096
"""A failover that loses more entries than this is told as a lost history."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The epochs of a history, newest first, each with the number at which it left the next one.

    Attributes:
        epochs: pairs of epoch and fork number; None for the oldest known, of whose parent nothing is known.
    """

    epochs: tuple[tuple[str, int | None], ...]

    def common(self, epoch: str) -> int | None:
        """The last number that today's epoch and an older one have in common; None if nothing is known of it.

        For today's epoch itself there is no such number: asking for it is misuse.
        """
        assert self.epochs[0][0] != epoch
        lowest: int | None = None
        for (_, fork), (parent, _) in pairwise(self.epochs):
            if fork is None:
                return None
            lowest = fork if lowest is None else min(lowest, fork)
            if parent == epoch:
                return lowest
        return None


class Trail:
    """The newest ids that this process appended or followed, and the epoch it believes in.

    Attributes:
        epoch: empty while nothing has been seen.
        number: the newest number seen.
        id: its id; empty for number 0.
    """

    def __init__(self) -> None:
        self.epoch = ""
        self.number = 0
        self._ids: deque[str] = deque(maxlen=IDS_KEPT)

    @property
    def id(self) -> str:
        return self._ids[-1] if self._ids else ""

    @property
    def mark(self) -> Mark:
        """To be compared with the broker's."""
        return self.epoch, self.number, self.id

    @property
    def first(self) -> int:
        """The oldest number whose id is remembered."""
        return self.number - len(self._ids) + 1

    def id_of(self, number: int) -> str | None:
        """The id of an entry; None if it is not remembered. Number 0, before the first entry, has the empty id."""
        if number == 0:
            return ""
        return self._ids[number - self.first] if self.first <= number <= self.number else None

    def forget(self) -> None:
        """Believe in nothing any more."""
        self.restart("", 0, ())

    def restart(self, epoch: str, number: int, ids: Sequence[str]) -> None:
        """Remember nothing but the ids of the newest entries, the last of which is that of `number`."""
        assert bool(number) == bool(ids)
        self.epoch = epoch
        self.number = number
        self._ids = deque(ids, maxlen=IDS_KEPT)

    def extend(self, start: int, previous: str, ids: Sequence[str]) -> None:
        """Remember entries of the believed epoch.

        Entries that contradict what is remembered are not: whoever compares `mark` with the broker will find the fork.
        """
        if start > self.number + 1:
            self.restart(self.epoch, start - 1, [previous])
        known = self.number + 1 - start
        before = ids[known - 1] if 0 < known <= len(ids) else previous
        if known < len(ids) and before == self.id:
            self._ids.extend(ids[known:])
            self.number += len(ids) - known

    def rewind(self, epoch: str, number: int) -> None:
        """Go over to a new epoch, which has everything up to a remembered number."""
        assert number >= self.number or self.id_of(number) is not None
        self.epoch = epoch
        for _ in range(min(self.number - number, len(self._ids))):
            self._ids.pop()
        self.number = min(self.number, number)
