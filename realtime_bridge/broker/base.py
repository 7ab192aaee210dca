"""What every broker is: one ordered, bounded history, a notification, and a lease.

Entries are numbered 1, 2, 3 … without holes. Each names its predecessor's id, so that a reader who meets another
predecessor than it has seen knows that the history was cut back and went on differently: a *fork*. A fork makes a new
*epoch* whose parent is the old one: positions of the parent up to the fork stay valid, later ones rewind to it. A
history that is gone makes an epoch without parent: no older position is valid.

Beside the history lies the *row index*: for each table a bounded store of texts. The leader chooses their fields, and
they change in the same step as the history does: an append that is lost loses what it wrote there, too.

Layer: adapters (contract). May import: words.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, Self

from realtime_bridge.change import Body, Entry, Position


@dataclass(frozen=True, slots=True)
class Head:
    """Where the history ends.

    Attributes:
        number: the newest entry's number; 0 if there never was one.
        id: its id; empty if there never was one.
        first: the oldest number still held; `number + 1` if the history is empty.
        proven_until: seconds since 1970: the source has proven that nothing committed before is missing here.
    """

    epoch: str
    number: int
    id: str
    first: int
    proven_until: float


@dataclass(frozen=True, slots=True)
class Update:
    """What a follower learns, in order.

    Attributes:
        kind: `entries`: the next ones, possibly none (then only `proven_until` is new, or the broker has just proven
            that it is alive). `fork`: everything after `number` never happened; what follows continues from there.
            `lost`: the history is gone; what follows continues from `number` in a history that nobody has read.
        epoch: the epoch from here on.
        number: the newest number that the follower has seen after this update.
    """

    kind: Literal["entries", "fork", "lost"]
    epoch: str
    number: int
    entries: tuple[Entry, ...] = ()
    proven_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Durability:
    """What a shared broker keeps through a misfortune of its own, as it says itself.

    Attributes:
        persistence: when an append is safe on disk, if ever.
        replicas: that could take over.
        evicts: it may drop the history when memory is short.
    """

    persistence: Literal["always", "every second", "snapshots", "none", "unknown"] = "unknown"
    replicas: int = 0
    evicts: bool = False


SIGHT_SECONDS: Final = 150.0
"""For so long after a sight was told of somebody may be served by it still: tell of it again in less than half of that,
and before anybody is served who comes."""
SIGHTS_OF_A_TABLE: Final = 8
"""Per user; tokens of one user can differ in what they show. That told of longest ago goes first."""
MOST_SIGHTS: Final = 500_000
"""Users, times tables. What was told of longest ago goes first; who comes back then is told to read again."""


class Sight(NamedTuple):
    """What a user sees of a table, as some process has found it.

    Attributes:
        user: the same word for the same user and role, whatever the token.
        digest: `rights.alone.rest`, of what decides it: equal if the same rows are seen. By the same rights, two that
            differ in what stands `alone` (a token, or what no entry tells the change of) can be in use at the same
            time. Of all others, that of which it was told later has taken the other's place: entries tell the rest.
        changed: the number since which it is so, if it is news to the broker that it is; None if nobody knows.
        least: the number before which it may have been otherwise, whatever the broker knows; 0 for none.
        before: the digest that held until `changed`, if it was this one's and holds for nobody any more; or empty.
        number: where the process stands, and so where it lets a user begin of whom nothing is known.
    """

    user: str
    table: str
    digest: str
    changed: int | None = None
    least: int = 0
    before: str = ""
    number: int = 0


NOTE: Final = ""
"""The field of a table in the row index that its bound does not concern: what the leader notes of the table."""
FIELD_BYTES: Final = 64
"""What a field is taken to cost beside its name and its text."""


@dataclass(frozen=True, slots=True)
class RowChange:
    """One change of the row index.

    Attributes:
        field: None: every field of the table is forgotten, the note, too.
        text: None: the field is forgotten.
        only_new: a field that is there already is left as it is.
    """

    table: str
    field: str | None = None
    text: bytes | None = None
    only_new: bool = False


class IndexedTable(NamedTuple):
    """What the row index holds of a table.

    Attributes:
        size: bytes, as its bound counts them.
        left_out: new fields that found no room, since the table was forgotten last.
    """

    size: int
    left_out: int


class Broker(Protocol):
    """Keeps the history, tells followers of news, and lets exactly one process lead.

    Enter it before anything else and leave it last. Every method may raise `BrokerError` when the broker cannot be
    reached or refuses; every method is safe to cancel, and what was cancelled either happened whole or not at all.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def acquire_lease(self, *, ttl: float) -> str:
        """Wait until this process may lead; return its fencing token, unlike any other ever given."""
        ...

    async def keep_lease(self, token: str, *, ttl: float) -> None:
        """Extend the lease three times per `ttl` seconds, for ever.

        Raises:
            LeaseLostError: another process leads, or the lease could not be extended in time.
        """
        ...

    async def release_lease(self, token: str) -> None:
        """Give the lease up if it is still this token's. Never raises for a lease that is gone."""
        ...

    async def append(
        self,
        token: str,
        bodies: Sequence[Body],
        *,
        watermark: str = "",
        proven_until: float | None = None,
        rows: Sequence[RowChange] = (),
    ) -> Head:
        """Append bodies as the next entries, trim, change the row index, and notify, in one atomic step.

        With no bodies only `watermark` and `proven_until` are stored and told, and the row index is changed.

        Args:
            token: fencing token; checked in the same step.
            bodies: at most 1000.
            watermark: stored in the same step; empty leaves the stored one as it is.
            proven_until: as in `Head`; None leaves the stored one as it is. The newest proof counts, be it of an
                earlier time: then a clock was set back.
            rows: in this order. A new field that would make the row index larger than its bound is left out; one that
                is there may still grow.

        Raises:
            LeaseLostError: a later token exists; nothing was appended.
            ForkError: the history is not the continuation of what it was when the term began, or of what was appended
                since, whoever has noticed that before; nothing was appended, a new epoch stands, and the source should
                be opened again after `watermark()`. Told once.
        """
        ...

    async def rows(self, table: str, fields: Sequence[str]) -> list[bytes | None]:
        """The texts of at most 1000 fields of a table in the row index, None for each that is not there."""
        ...

    async def fields(self, table: str, *, most: int) -> list[str] | None:
        """The fields of a table in the row index, but for the note; None if there are more than `most`."""
        ...

    async def indexed(self) -> Mapping[str, IndexedTable]:
        """The tables of which the row index holds anything."""
        ...

    async def watermark(self) -> str | None:
        """The watermark of the newest entry, or None if there never was one."""
        ...

    async def head(self) -> Head:
        """Where the history ends now."""
        ...

    async def locate(self, position: Position) -> int:
        """The number after which a reader at `position` goes on, in today's epoch.

        Raises:
            HistoryGoneError: the position is of an unknown epoch, beyond the end, or what follows it is trimmed.
        """
        ...

    async def recall(self, epoch: str, sights: Sequence[Sight]) -> list[int]:
        """Remember what users see, and tell for each sight since which number nothing else can have been in use.

        A reader of an older position than the answer may have a copy that shows what it may not see, or lacks what it
        may. Another sight that can be in use may be so until `SIGHT_SECONDS` after it was last told of: until then the
        answer is the next entry's number. A user of whom nothing is known has no copy: then it is `Sight.number`.
        No answer lies beyond the next entry. What was told of is kept for as long as the history.

        Args:
            epoch: that of the numbers.
            sights: as this process has found them.

        Raises:
            BrokerError: also if that is not today's epoch: follow it first.
        """
        ...

    async def read(self, after: int, *, limit: int = 500, max_bytes: int = 1 << 20) -> list[Entry]:
        """Read the entries that follow a number, oldest first; an empty list means the end was reached.

        Never waits. Returns at least one entry if there is one, whatever its size.

        Raises:
            HistoryGoneError: what follows `after` is trimmed.
        """
        ...

    def follow(self) -> AbstractAsyncContextManager[AsyncIterator[Update]]:
        """Follow the history from its present end.

        The first update comes at once, has no entries and says where the follower stands. From then on every entry
        comes in order and without a hole, whatever notifications get lost; a hole is read from the history. If a
        follower lags so far that the history is trimmed under it, it is told `lost` with the same epoch.
        At least every 2 s there is an update, if the broker is alive. When the broker cannot be reached the iterator
        raises `BrokerError`; follow again, and compare the first update with what was seen last.
        """
        ...
