"""A reader: who reads which tables, from where, and what a change looks like to it.

Layer: core. May import: words, filters, policy.base, wire, hub.base.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from realtime_bridge.change import ABSENT, Change, Control, Image, Relation, ResyncReason
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BadRequestError
from realtime_bridge.filters import BoundFilter, Filter
from realtime_bridge.policy.base import Member, Policy, Seen
from realtime_bridge.wire.native import Form

if TYPE_CHECKING:
    from realtime_bridge.hub.connection import Connection


class Unknown(Enum):
    """The type of `UNKNOWN`."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN
"""What a reader sees of a change cannot be decided: it is told to read the table again."""


SPREAD_SECONDS: Final = 10.0
"""A reader may be told to wait so long before it reads a table again."""
LOAD_SECONDS: Final = 60.0
"""A reader that begins, or has waited, may take so long to read a table; `client.js` gives up then."""


UNSURE: Final = 1
"""In place of a digest in `Position.told`: its reader was served where it was not known what it sees."""
NOT_KNOWN: Final = Seen("", 0, 0)
"""What a copy rests on that was read while that was not known, or belongs to who came then."""


class State(Enum):
    """Where a subscription stands."""

    AT_END = auto()
    """It has everything; new entries are written straight to its sink."""
    BEHIND = auto()
    """Somebody is about to read on for it."""
    BLOCKED = auto()
    """It waits for room in its sink."""
    HELD = auto()
    """It waits for a time: until a resync may be sent, or until the broker is asked again."""
    AHEAD = auto()
    """Its position is one that this process has not reached yet."""
    ENDED = auto()


@dataclass(eq=False, slots=True)
class Subscription:
    """One interest of one connection, with its position.

    Attributes:
        id: the client's name for it; None for the one made by the address.
        number: what it has examined; while AT_END the hub's own number stands for it.
        events: operations delivered, by the delivered type; None for all.
        columns: columns shown beside the key; None for all.
        by_hand: whether its transport advances it (a long poll); called when there is something to read.
        owed: a resync of all its tables that must be sent before anything else; `number` means nothing meanwhile.
        came_told: as in `Position`, of the one that it came with.
        fresh: of one that began at the present, what its reader is about to read: its member, and `Member.learned`.
        covered: table → number up to which a resync that was sent stands for everything.
        told: table → time of its newest resync.
        began: when it did, by the monotonic clock.
        seen: table → the newest of `Member.sights` that its reader's copy may rest on.
    """

    connection: "Connection"
    id: str | None
    tables: frozenset[str]
    number: int
    filter: Filter | None = None
    events: frozenset[str] | None = None
    columns: tuple[str, ...] | None = None
    by_hand: Callable[[], None] | None = None
    state: State = State.BEHIND
    owed: ResyncReason | None = None
    came_told: int = 0
    fresh: tuple[Member, int] | None = None
    covered: dict[str, int] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    seen: dict[str, Seen] = field(default_factory=dict)
    _bound: tuple[str, BoundFilter] = ("", BoundFilter(()))

    @property
    def ids(self) -> tuple[str, ...]:
        """The `subscriptions` of a message for this one alone."""
        return () if self.id is None else (self.id,)

    def sent_to(self, end: int) -> int:
        """The number up to which it was sent everything, where `end` is that of those at the end.

        A fan-out makes it fall behind at a number whose messages may still wait to be written: what counts then is the
        end. Only one that is ahead has been sent, elsewhere, what lies beyond.
        """
        if self.state is State.AT_END:
            return end
        return self.number if self.state is State.AHEAD else min(self.number, end)

    @property
    def plain(self) -> bool:
        """Whether it takes every change of its tables as it is."""
        return self.filter is None and self.events is None

    def see(self, *tables: str) -> None:
        """The reader's copy, of some tables that it reads again or of all, rests on what its member sees now."""
        member = self.connection.member
        for table in tables or self.tables:
            if table not in member.unknown:
                self.seen.update({table: member.sights[table]} if table in member.sights else {})
            elif tables or table not in self.seen:
                self.seen[table] = NOT_KNOWN

    def see_if_fresh(self) -> None:
        """Once its member is compared: whoever began at the present has nothing from a time with another token."""
        member = self.connection.member
        if self.fresh == (member, member.learned):
            self.see()
        self.fresh = None

    def concerns(self, resync: Control) -> bool:
        """Whether a resync is for it: one of readers since a time may not be."""
        if resync.since is None:
            return True
        read = max([self.began, *(told + SPREAD_SECONDS for told in self.told.values())]) + LOAD_SECONDS
        return time.monotonic() - read < time.time() - resync.since / 1_000_000

    def outdated(self, table: str, until: int) -> bool:
        """Whether what its reader has of a table may be other than what its member sees.

        While it is served here the digests tell. For one that has come from elsewhere its position does; and so it does
        where the digest is the same and may have been another in between, once the reader comes up to there (`until`).
        """
        now, seen = self.connection.member.sights.get(table), self.seen.get(table)
        if now is None or table in self.connection.member.unknown:
            return False
        if seen is None and self.came_told == UNSURE:  # all at once: it keeps that until everything is known
            return not self.tables & self.connection.member.unknown
        if seen is None:
            return self.number < now.elsewhere and not (self.came_told and self.came_told == self._sighted())
        return not now.is_as(seen) and (seen.digest != now.digest or self.number < now.since <= until)

    @property
    def is_current(self) -> bool:
        """Whether no table can be `outdated` as things are, however far its reader reads."""
        sights = self.connection.member.sights
        return not any(self.outdated(table, sights[table].since) for table in self.tables if table in sights)

    def told_at(self, number: int) -> int:
        """`Position.told` where its reader was sent everything up to a number."""
        if self.tables & self.connection.member.unknown:
            return UNSURE
        sights = self.connection.member.sights
        by_entries = all(s.since <= number >= s.elsewhere for t, s in sights.items() if t in self.tables)
        # Who came with one keeps it: what made it necessary may do so again.
        return 0 if (by_entries and not self.came_told) or not self.is_current else self._sighted()

    def _sighted(self) -> int:
        """A digest, neither 0 nor `UNSURE`, of what its member sees of its tables."""
        sights = self.connection.member.sights
        seen = sorted((table, sights[table].digest) for table in self.tables if table in sights)
        return 2 + int.from_bytes(blake2b(repr(seen).encode(), digest_size=7).digest())

    def shown(self, table: str) -> tuple[str, ...] | None:
        """The columns shown of a table beside its key: those chosen, as far as they may be read; None for all."""
        allowed = self.connection.member.columns.get(table)
        if allowed is None or self.columns is None:
            return self.columns if allowed is None else allowed
        return tuple(column for column in allowed if column in self.columns)

    def form(self, change: Change, old: bool | None, new: bool | None) -> Form | Unknown | None:
        """What it is sent of a change, given what its member may see; None for nothing.

        Raises:
            BadRequestError: its filter cannot be read over this relation, or by this member.
        """
        if self.filter is not None:
            bound = self._bind(self.filter, change.relation)
            old = _and(old, _matches(bound, change.old))
            new = _and(new, _matches(bound, change.new))
        form = form_of(change, old, new)
        if isinstance(form, Form) and self.events is not None and form.operation not in self.events:
            return None
        return form

    def _bind(self, filter_: Filter, relation: Relation) -> BoundFilter:
        allowed = self.connection.member.columns.get(relation.name)
        if not (allowed is None or filter_.columns <= set(allowed)):
            raise BadRequestError("filter: a column may not be read any more")
        if self._bound[0] != relation.version:
            self._bound = (relation.version, filter_.bind(relation))
        return self._bound[1]


def check_filter(filter_: Filter, table: str, claims: Claims, policy: Policy) -> bool:
    """Whether a filter is known to be one of a table as it is now; False where the table's columns are not known.

    Which columns there are is told to nobody who may not read them: to such a role an unknown one is like a hidden one.

    Raises:
        BadRequestError: it never could hold.
    """
    if (refusal := policy.refusal(table, claims, filter_.columns)) is not None:
        raise BadRequestError(f"filter: {refusal}")
    relation = policy.relation(table)
    if relation is not None:
        filter_.bind(relation)
    return relation is not None


def _matches(bound: BoundFilter, image: Image | None) -> bool | None:
    return None if image is None else bound.matches(image)


def _and(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def form_of(change: Change, old: bool | None, new: bool | None) -> Form | Unknown | None:
    """What a change looks like to a reader who may, may not, or perhaps may see its old and new row."""
    if change.operation == "INSERT":
        return {True: Form.INSERT, False: None, None: UNKNOWN}[new]
    if change.operation == "DELETE":
        return {True: Form.DELETE, False: None, None: UNKNOWN}[old]
    if new is None or (new and not old and not is_whole(change.new)):  # a row that enters must be whole
        return UNKNOWN
    if not new:
        return {True: Form.LEAVE, False: None, None: UNKNOWN}[old]
    if old is False:
        return Form.INSERT
    if old and change.old is not None and is_whole(change.old):
        return Form.UPDATE
    return UNKNOWN if old is None and _key_changed(change) else Form.UPDATE_KEY


def is_whole(image: Image | None) -> bool:
    """Whether an image holds every column."""
    return image is not None and ABSENT not in image


def _key_changed(change: Change) -> bool:
    if change.old is None or change.new is None:
        return False
    return change.relation.key_of(change.old) != change.relation.key_of(change.new)
