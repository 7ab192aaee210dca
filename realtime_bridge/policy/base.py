"""What decides who may see a change.

The hub asks in two ways: for the newest entries, which of all present members see them (`audience`: costs what its
answer is long); for a member who reads on from an older position, which of some entries it sees (`verdicts`). Both are
decided now, with the facts that hold now. Unknown is never yes.

Layer: adapters (contract). May import: words.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from realtime_bridge.change import Entry
from realtime_bridge.claims import Claims


class Member:
    """Users whom no policy can tell apart: one member, however many connections.

    Compared by identity. Made by `Policy.join` alone.
    """

    __slots__ = ("__weakref__", "claims", "facts", "key", "uses")

    def __init__(self, key: tuple[str, str], claims: Claims) -> None:
        self.key = key
        self.claims = claims
        self.facts: dict[str, object] = {}
        self.uses = 0


class Verdict(NamedTuple):
    """What one member may see of one change. False is a proof that it may not; None is unknown and shows nothing."""

    old: bool | None
    new: bool | None


@dataclass(frozen=True, slots=True)
class Audience:
    """Who of the present members may see a change.

    The sets may be shared with the policy's own: read them before the next call, and never change them.

    Attributes:
        old: members who may see the old image (empty for an INSERT).
        new: members who may see the new image (empty for a DELETE).
        unknown: members for whom the old or the new image could not be decided and whose copy may now be out of
            date; they get one coalesced `resync`.
    """

    old: Set[Member]
    new: Set[Member]
    unknown: Set[Member] = frozenset()


class Policy(Protocol):
    """Decides, per entry, which members may see it."""

    def join(self, claims: Claims) -> Member:
        """The member for these claims; from now on it is part of every audience. Pair with `leave`."""
        ...

    def leave(self, member: Member) -> None:
        """One use of the member less; with its last use it is forgotten."""
        ...

    async def audience(self, entries: Sequence[Entry]) -> list[Audience]:
        """Who may see each entry, one answer an entry (controls have an empty audience).

        Raises nothing: what cannot be decided is unknown, and counted.
        """
        ...

    async def verdicts(self, entries: Sequence[Entry], member: Member) -> list[Verdict]:
        """What one member may see of each entry. Raises nothing."""
        ...

    async def reload(self, table: str) -> None:
        """Read a table's policies, grants and columns again (`*`: of all). Raises nothing: a failure denies."""
        ...

    def refusal(self, table: str, claims: Claims) -> str | None:
        """Why nobody with this role will ever get a change of this table, in one sentence; None if somebody may."""
        ...
