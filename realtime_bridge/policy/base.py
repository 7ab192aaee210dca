"""What decides who may see a change.

The hub asks in two ways: for the newest entries, which of all present members see them (`audience`: costs what its
answer is long); for a member who reads on from an older position, which of some entries it sees (`verdicts`). Both are
decided now, with the facts that hold now. Unknown is never yes.

What is known of a member has to be asked first, and can stop holding. Until it is known again the member is *pending*:
it is in no audience, and the hub keeps its readers behind until `load` has been called for it.

Layer: adapters (contract). May import: words.
"""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple, Protocol

from realtime_bridge.change import Entry, Relation
from realtime_bridge.claims import Claims


class Seen(NamedTuple):
    """What is seen of a table.

    Attributes:
        digest: of what decides it.
        since: the number since which it has been so, for readers who were served here meanwhile.
        elsewhere: the same for those who come from elsewhere, perhaps with another token.
    """

    digest: str
    since: int
    elsewhere: int

    def is_as(self, other: "Seen") -> bool:
        """Whether whoever was served here meanwhile sees as before."""
        return self[:2] == other[:2]


class Member:
    """Users whom no policy can tell apart: one member, however many connections.

    Compared by identity. Made by `Policy.join` alone.

    Attributes:
        pending: nothing may be decided for it before `Policy.load`.
        learned: how often it was loaded: what was decided before the last time may have been so while it was pending.
        compared: whether what it sees was compared with what the broker remembers, since it came or was loaded.
        doubts: table → number of the newest entry that put in doubt what it sees there, until that was compared.
        confirmed: tables of which what it sees was read because of an entry, not at some time that no entry tells.
        sights: table → what it sees there, as a digest, and the number since which it has been so, as far as anybody
            knows.
        unknown: tables of which it could not be found out what it sees, when it was compared last.
        columns: table → those it may read, in column order; a table that is missing here it may read whole.
    """

    __slots__ = (
        "__weakref__",
        "claims",
        "columns",
        "compared",
        "confirmed",
        "doubts",
        "facts",
        "key",
        "learned",
        "pending",
        "sights",
        "unknown",
        "uses",
    )

    def __init__(self, key: tuple[str, str], claims: Claims) -> None:
        self.key = key
        self.claims = claims
        self.facts: dict[str, object] = {}
        self.uses = 0
        self.pending = True
        self.learned = 0
        self.compared = False
        self.doubts: dict[str, int] = {}
        self.confirmed: set[str] = set()
        self.sights: dict[str, Seen] = {}
        self.unknown: Set[str] = frozenset()
        self.columns: Mapping[str, tuple[str, ...]] = {}


class Verdict(NamedTuple):
    """What one member may see of one change. False is a proof that it may not; None is unknown and shows nothing.

    Attributes:
        changed: tables of which the member may see other rows from this entry on, whatever the digests tell.
    """

    old: bool | None
    new: bool | None
    changed: frozenset[str] = frozenset()


class Audience(NamedTuple):
    """Who of the present members may see a change.

    The sets may be shared with the policy's own: read them before the next call, and never change them.

    Attributes:
        old: members who may see the old image (empty for an INSERT).
        new: members who may see the new image (empty for a DELETE).
        unknown: members for whom the old or the new image could not be decided and whose copy may now be out of
            date; they get one coalesced `resync`.
        doubtful: members who are pending from this entry on, and so in no later audience of the same answer either.
        unsure: of `new`, those for whom the old image could not be decided; all others of it, who are not of `old`, are
            proven not to have seen it.
    """

    old: Set[Member]
    new: Set[Member]
    unknown: Set[Member] = frozenset()
    doubtful: Set[Member] = frozenset()
    unsure: Set[Member] = frozenset()


class Reloaded(NamedTuple):
    """What a reload has found.

    Attributes:
        altered: tables that are something else than they were known to be last; none that could not be read.
        parted: every member is pending, and has to be joined anew, since policies may tell apart now what they could
            not before: some were altered, or cannot be read, or can be again.
        unread: tables that cannot be read now: what was found of them before says nothing of what they are.
    """

    altered: frozenset[str] = frozenset()
    parted: bool = False
    unread: frozenset[str] = frozenset()


class Policy(Protocol):
    """Decides, per entry, which members may see it."""

    def join(self, claims: Claims) -> Member:
        """The member for these claims; once loaded it is part of every audience. Pair with `leave`."""
        ...

    def leave(self, member: Member) -> None:
        """One use of the member less; after its last use it is forgotten, now or some time later."""
        ...

    async def load(self, members: Sequence[Member]) -> None:
        """Learn what must be known of these members, in as few questions as possible.

        Afterwards they are not pending, save those of whom an entry met meanwhile has put something in doubt again.
        Raises nothing: what could not be learned within a bounded time is unknown, and counted.
        """
        ...

    def digest(self, member: Member, table: str) -> str:
        """A digest of what decides which rows of a table a loaded member sees: equal if nothing has changed.

        Empty if it is not known now. Its parts are as in `Sight.digest`.
        """
        ...

    async def audience(self, entries: Sequence[Entry]) -> list[Audience]:
        """Who may see each entry, one answer an entry (controls are seen by nobody).

        Raises nothing: what cannot be decided is unknown, and counted.
        """
        ...

    async def verdicts(self, entries: Sequence[Entry], member: Member) -> list[Verdict]:
        """What one member, not pending, may see of each entry. Raises nothing."""
        ...

    async def outdated(self) -> bool:
        """Whether what the policy knows of rights is not what holds now. Changes nothing and raises nothing."""
        ...

    async def reload(self, table: str) -> Reloaded:
        """Read a table's policies, grants and columns again (`*`: of all). Raises nothing: a failure denies.

        While they cannot be read, every change of the table is unknown to everybody.
        """
        ...

    def has_expired(self, member: Member) -> bool:
        """Whether what is known of a member is too old to decide by, with nothing that says so."""
        ...

    def expire(self, member: Member) -> bool:
        """Have such a member pending; its readers must not be at the end then. False if it is no such member."""
        ...

    def part(self) -> None:
        """Forget every member, with all that it saw: each is pending then, and has to be joined anew."""
        ...

    def refusal(self, table: str, claims: Claims, columns: Set[str] = frozenset()) -> str | None:
        """Why nobody with this role will ever get a change of this table, or may read all of these columns of it.

        In one sentence; None if somebody may.
        """
        ...

    def relation(self, table: str) -> Relation | None:
        """A table as it is now, with every column that changes of it bring; None if that is not known."""
        ...
