"""Judges what clients were told: nothing unseen, nothing missing, nothing out of order, no resync without a reason.

What is judged rests on facts that change, and nobody can say from outside by which of them a change was decided: by
those after its own commit, or by any that came later, up to the message. So a message is wrong if it is right by none
of them, and a change was to be told if it was by each of them.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final, NamedTuple

from tests.clients import Message
from tests.oracle.copies import Copy, Told, concerned
from tests.oracle.truth import Commit, RowChange, Truth
from tests.oracle.world import ALTERED, KEYS, Facts, Row, User

_SHOWN: Final = 30
"""Messages shown of a client that something is wrong with."""
_FOUND: Final = timedelta(seconds=1.5)
"""After a bridge has come, in the history, to what another has found in the database, others may for so long have yet
to come to it: whoever goes from one to the other until then sees otherwise each time, and is told."""
_NEW_HISTORY: Final = frozenset({"history_gone", "upstream_gap"})
"""Reasons after which changes may be told again."""


_PROVEN: Final = frozenset({"ping", "pong", "polled"})
"""Messages that may say up to when everything was told."""
_COMMITTING: Final = timedelta(seconds=0.25)
"""A commit has its time a moment before it is written, and so before anybody can come to it."""


_NOT_KNOWN: Final = "UPDATE without the old row"
_SEEN_NOW: Final = frozenset({"INSERT", "UPDATE"})


class Place(NamedTuple):
    """A change: of which commit, and which of its changes."""

    commit: int
    ordinal: int


class _Book:
    """What a copy has been told, as far as the judge has to remember it.

    Attributes:
        floor: table → commits up to this number are in the copy, since the table was read later.
        seen: the changes that were told.
        proven: the newest commit of which the copy was told that it has everything up to there.
        links: when each began to tell, since the last review.
        proofs: since then, when it was told that it has everything, and up to which commit.
        here: subscription → those told on the newest link.
        resyncs: (table, reason) → how many were told.
        told_at: the same → position and link of the last one.
        excuses: the same → how many there were reasons for, and have not been told.
        told_to_read: the resyncs since the last review but one.
        last: what was told last.
    """

    def __init__(self, copy: Copy) -> None:
        self.floor = dict.fromkeys(copy.user.tables, 0)
        self.seen: set[Place] = set()
        self.proven = 0
        self.link = 0
        self.links: list[datetime] = []
        self.proofs: list[tuple[datetime, int]] = []
        self.here: dict[str, list[Place]] = defaultdict(list)
        self.resyncs: Counter[tuple[str, str]] = Counter()
        self.told_at: dict[tuple[str, str], tuple[str, int]] = {}
        self.excuses: Counter[tuple[str, str]] = Counter()
        self.told_to_read: list[Told] = []
        self.last: list[Told] = []


class Judge:
    """Looks at what copies were told, whenever everything has been told.

    Attributes:
        violations: what was wrong, in words.
    """

    def __init__(self, truth: Truth) -> None:
        self.violations: list[str] = []
        self._granted: Counter[str] = Counter()
        self._reviewed = 0
        self._truth = truth
        self._books: dict[Copy, _Book] = {}

    def review(self, copies: Sequence[Copy]) -> None:
        """Judge what copies were told. They must have been told everything that is committed, and nothing be begun."""
        for copy in copies:
            book = self._hear(copy)
            self._find_missing(copy, book)
            self._charge(copy, book, self._reasons(copy.user, self._reviewed, book))
            book.links.clear()
            book.proofs.clear()
        self._granted.clear()
        self._reviewed = self._truth.newest.number

    def was_told(self, copy: Copy) -> bool:
        """Whether a copy was told of all that it had to be. One that has read a table late may be ahead of that."""
        book, newest = self._hear(copy), self._truth.newest.number
        return not any(True for _ in self._missing(copy, book, min(book.floor.values()) + 1, newest, newest))

    def grant(self, reasons: Mapping[str, int]) -> None:
        """Excuse so many resyncs of every table to every copy, for a fault."""
        self._granted.update(reasons)

    def accuse(self, copy: Copy, what: str) -> None:
        """Put down a violation, with what the copy was told last."""
        book = self._books.get(copy)
        last = _shown([*(book.last if book else ()), *copy.told])
        lines = [f"  {one.link}, {one.begun}: {json.dumps(one.message, ensure_ascii=False)[:400]}" for one in last]
        self.violations.append("\n".join([f"{copy.name}: {what}; told last (link, commits begun: message):", *lines]))

    # -- a message

    def _hear(self, copy: Copy) -> _Book:
        """Judge what a copy was told since the last time."""
        book = self._books.setdefault(copy, _Book(copy))
        told, copy.told = copy.told, []
        book.last = _shown([*book.last, *told])
        for one in told:
            self._look(copy, book, one)
        return book

    def _look(self, copy: Copy, book: _Book, told: Told) -> None:
        if told.link != book.link:
            book.link = told.link
            book.links.append(told.at)
            book.here.clear()
        message = told.message
        if message["type"] == "start":
            book.floor.update(dict.fromkeys(message["tables"], told.begun))
        elif message["type"] == "resync":
            self._resync(copy, book, told)
        elif message["type"].isupper():
            self._change(copy, book, told)
        elif message["type"] in _PROVEN and "complete_until" in message:
            self._prove(copy, book, told)

    def _resync(self, copy: Copy, book: _Book, told: Told) -> None:
        reason, where = told.message["reason"], (told.message["position"], told.link)
        book.told_to_read.append(told)
        for table in concerned(told.message, copy.user):
            position, link = book.told_at.get((table, reason), ("", 0))
            if position != where[0] or link == told.link:  # else the link broke before anything moved it on
                book.resyncs[table, reason] += 1
            book.told_at[table, reason] = where
            book.floor[table] = told.begun
        if reason in _NEW_HISTORY:
            book.here.clear()

    def _change(self, copy: Copy, book: _Book, told: Told) -> None:
        message = told.message
        for reader in message.get("subscriptions", ["address"]):
            here = book.here[reader]
            place = self._place(copy.user, told, here)
            if place is None:
                self.accuse(copy, f"a change that never was, or was told twice: {message}")
                continue
            if here and place < here[-1]:
                self.accuse(copy, f"out of order, after {here[-1]}: {message}")
            here.append(place)
            book.seen.add(place)
            self._judge(copy, told, place)

    def _place(self, user: User, told: Told, here: Sequence[Place]) -> Place | None:
        """Which change a message tells, other than those that the link has told; None if there is none like it.

        Of several that are alike in what is told, that which is to be told so.
        """
        alike: list[Place] = []
        for commit in self._truth.at(told.message["commit_timestamp"]):
            for ordinal, change in enumerate(commit.changes):
                place = Place(commit.number, ordinal)
                if place not in here and _tells(told.message, change):
                    alike.append(place)
                    if _form_of(told.message, change) in self._forms(user, place, told.begun):
                        return place
        return alike[0] if alike else None

    def _forms(self, user: User, place: Place, last: int) -> set[str | None]:
        """As what a change may be told, by the facts before it and after every commit up to the last."""
        change = self._truth.commits[place.commit].changes[place.ordinal]
        return {_form(facts, user, change) for facts in self._truth.facts(place.commit - 1, last)}

    def _judge(self, copy: Copy, told: Told, place: Place) -> None:
        """Whether a change may be told in this way to this user."""
        change = self._truth.commits[place.commit].changes[place.ordinal]
        user, message = copy.user, told.message
        since, before = (self._truth.facts(first, told.begun) for first in (place.commit, place.commit - 1))
        saw_old = any(facts.show(user, change.table, change.old) for facts in before)
        if "record" in message and not any(facts.show(user, change.table, change.new) for facts in since):
            self.accuse(copy, f"leaked, the new row of commit {place.commit}: {message}")
        if _discloses_old(message, change) and not saw_old:
            self.accuse(copy, f"leaked, the old row of commit {place.commit}: {message}")
        forms = self._forms(user, place, told.begun)
        if _form_of(message, change) == _NOT_KNOWN and self._granted["visibility_changed"] and forms <= _SEEN_NOW:
            return  # who saw the old row could not be decided, while the database could not be asked
        if len(forms) == 1 and _form_of(message, change) not in forms:
            self.accuse(copy, f"told as {_form_of(message, change)} what is {forms.pop()}: {message}")

    # -- all of them

    def _prove(self, copy: Copy, book: _Book, told: Told) -> None:
        """Whether a copy has been told of everything up to the time that it was told."""
        until = datetime.fromisoformat(told.message["complete_until"]) - _COMMITTING
        later = (c.number for c in self._truth.commits[book.proven + 1 : told.begun + 1] if c.at >= until)
        last = next(later, told.begun + 1) - 1
        for place, change, form in self._missing(copy, book, book.proven + 1, last, told.begun):
            self.accuse(
                copy, f"told to be complete, without {change} of commit {place.commit} as {form}: {told.message}"
            )
        book.proven = max(book.proven, last)
        book.proofs.append((told.at, last))

    def _find_missing(self, copy: Copy, book: _Book) -> None:
        newest = self._truth.newest.number
        for place, change, form in self._missing(copy, book, min(book.floor.values()) + 1, newest, newest):
            self.accuse(copy, f"never told of commit {place.commit}: {change} as {form}")
        book.floor, book.proven = dict.fromkeys(book.floor, newest), newest
        book.seen.clear()

    def _missing(
        self, copy: Copy, book: _Book, first: int, last: int, begun: int
    ) -> Iterator[tuple[Place, RowChange, str]]:
        """What was to be told of some commits, by the facts up to that of the number `begun`, and was not."""
        for commit in self._truth.commits[first : last + 1]:
            for ordinal, change in enumerate(() if commit.is_bulk else commit.changes):
                place = Place(commit.number, ordinal)
                if commit.number <= book.floor.get(change.table, commit.number) or place in book.seen:
                    continue
                forms = self._forms(copy.user, place, begun)
                if len(forms) == 1 and (form := forms.pop()) is not None:
                    yield place, change, form

    def _charge(self, copy: Copy, book: _Book, reasons: Counter[tuple[str, str]]) -> None:
        """Every resync must have a reason, now or at the last review; each reason excuses one."""
        for what, count in book.resyncs.items():
            if count > (excused := reasons[what] + book.excuses[what]):
                resyncs = [f"{one.link}, {one.begun}: {one.message}" for one in book.told_to_read]
                self.accuse(copy, f"{count} resyncs of {what[0]} as {what[1]}, where {excused} had a reason: {resyncs}")
        used = book.resyncs - book.excuses
        book.excuses, book.resyncs = reasons - used, Counter()
        book.told_to_read = [one for one in book.told_to_read if one.begun > self._reviewed]

    def _reasons(self, user: User, after: int, book: _Book) -> Counter[tuple[str, str]]:
        """(table, reason) → how many resyncs what was committed after a number, and what faults did, excuse."""
        found: Counter[tuple[str, str]] = Counter()
        commits = list(pairwise(self._truth.commits[after:]))
        alterations = sum(before.facts.policy != commit.facts.policy for before, commit in commits)
        for table in user.tables:
            found.update({(table, reason): count for reason, count in self._granted.items()})
            is_seen_otherwise = False
            for before, commit in commits:
                if table in commit.tables and commit.is_bulk:
                    found[table, "bulk"] += 1
                else:
                    found[table, "truncated"] += commit.truncated.count(table)
                if (changes := _changes_of_view(commit, before, user, table)) > 0:
                    # A bridge may find it in the database, before it comes to each change in the history.
                    found[table, "visibility_changed"] += 1 + changes + _links_meanwhile(commit, book)
                    is_seen_otherwise = True
            if is_seen_otherwise and table != ALTERED:
                # A position says of all tables together that they were told of ahead of the history: where another one
                # is altered meanwhile, a reader that comes back is told of this one again.
                found[table, "visibility_changed"] += alterations
        return found


def _shown(told: Sequence[Told]) -> list[Told]:
    """What is worth showing, at most: of messages that tell no news, those after which there was some."""
    quiet = [one.message["type"] in _PROVEN for one in told]
    return [one for one, now, then in zip(told, quiet, [*quiet[1:], False], strict=True) if not (now and then)][
        -_SHOWN:
    ]


def _links_meanwhile(commit: Commit, book: _Book) -> int:
    """How many links began while some bridges had found a commit, and others not."""
    told_at = next((at for at, proven in book.proofs if proven >= commit.number), None)
    return sum(commit.at <= at and (told_at is None or at < told_at + _FOUND) for at in book.links)


def _changes_of_view(commit: Commit, before: Commit, user: User, table: str) -> int:
    """How many changes of a commit change what a user sees of a table, or may, for all that the history tells.

    Each is one of its own to a reader whose poll is answered between two of them.
    """
    if commit.facts.about(user, table) is None:
        return 0
    is_altered = table == ALTERED and commit.facts.policy != before.facts.policy
    members = [change for change in commit.changes if change.table == "public.members"]
    own = [change for change in members if (change.new or change.old or {})["user_id"] == user.id]
    return is_altered + (bool(members) if commit.is_bulk else len(own))


def _tells(message: Message, change: RowChange) -> bool:
    """Whether a message is of this change."""
    if f"{message['schema']}.{message['table']}" != change.table:
        return False
    new, old = message.get("record"), message.get("old_record")
    if new is not None and new != change.new:
        return False
    if new is None and bool(message.get("left")) != (change.new is not None):
        return False
    if old is None:
        return bool(message["type"] == "INSERT")
    return change.old is not None and old in (change.old, _key(change.table, change.old))


def _key(table: str, row: Row) -> Row:
    return {column: row[column] for column in KEYS[table]}


def _discloses_old(message: Message, change: RowChange) -> bool:
    """Whether a message says anything of the old row that its new one does not."""
    old, new = message.get("old_record"), message.get("record")
    return old is not None and (new is None or any(new.get(column) != value for column, value in old.items()))


def _form(facts: Facts, user: User, change: RowChange) -> str | None:
    """What a change is to a user by these facts; None for nothing."""
    saw, sees = (facts.show(user, change.table, row) for row in (change.old, change.new))
    if not saw:
        return "INSERT" if sees else None
    if sees:
        return "UPDATE"
    return "DELETE" if change.new is None else "LEAVE"


def _form_of(message: Message, change: RowChange) -> str:
    """As what a message tells a change."""
    kind = str(message["type"])
    if kind == "DELETE":
        return "LEAVE" if message.get("left") else "DELETE"
    if kind == "UPDATE" and message["old_record"] != change.old:
        return _NOT_KNOWN
    return kind
