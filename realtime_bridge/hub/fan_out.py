"""The newest entries to everybody at the end: entry × audience × filters → sinks.

The cost follows the recipients. All that a batch has for one connection goes out in one write; the loop is given back
every few milliseconds, so that a large audience holds up nobody else.

Layer: core. May import: words, policy.base, wire, hub.*.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence, Set
from itertools import groupby
from typing import NamedTuple

from realtime_bridge.change import Change, Control, Entry, transaction_of
from realtime_bridge.errors import BadRequestError
from realtime_bridge.hub.breath import Breath
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.standing import Altered, Standing
from realtime_bridge.hub.subscription import UNKNOWN, State, Subscription, Unknown, form_of
from realtime_bridge.hub.window import Prepared
from realtime_bridge.policy.base import Audience, Member
from realtime_bridge.wire.native import Form

Pending = dict[Connection, list[bytes]]


class FanOut:
    """Delivers batches of entries to the subscriptions at the end.

    Args:
        resume: called with every subscription that falls behind because it must read (not because its sink is full).
    """

    def __init__(self, standing: Standing, resume: Callable[[Subscription], None]) -> None:
        self._standing = standing
        self._resume = resume
        self._loop = asyncio.get_running_loop()

    async def deliver(self, prepared: Sequence[Prepared]) -> None:
        """Decide and send a run of entries, in order, and move the hub's number to its end."""
        standing = self._standing
        async with standing.turn:
            breath = Breath()
            for run in runs(prepared):
                if isinstance(run, Reload):
                    await self.reload(*run)
                    continue
                audiences = await standing.policy.audience([item.entry for item in run])
                pending: Pending = {}
                for item, audience in zip(run, audiences, strict=True):
                    await self._collect(item, audience, pending, breath)
                await self._write(pending, run[-1].entry.number, breath)
            standing.number = prepared[-1].entry.number
            standing.counters.entries += len(prepared)
            standing.counters.entry_bytes += sum(item.entry.size for item in prepared)

    async def reload(self, table: str, number: int) -> None:
        """Read policies again (`*`: all), as of an entry. Who stands at the end before it stays there. In `turn` only.

        Every connection is joined anew: policies may tell apart now what they could not before.
        """
        standing = self._standing
        relation = standing.policy.relation
        shapes = {name: relation(name) for name in standing.tables}
        altered, is_parted, unread = await standing.policy.reload(table)
        standing.reloads += 1
        standing.altered.update(dict.fromkeys(altered, Altered(self._loop.time())))
        for name in unread:
            standing.altered.pop(name, None)
        now = time.monotonic()
        reshaped = [name for name in altered if shapes.get(name) and relation(name) not in (None, shapes[name])]
        standing.reshaped.update(dict.fromkeys(reshaped, now))
        if is_parted:
            async for before, member in self._join_anew(number):
                if not member.sights:  # the first of its connections; what it saw until now
                    member.sights = dict(before.sights)
                    member.doubts.update({**before.doubts, **dict.fromkeys(altered, number)})

    async def renew(self, number: int) -> None:
        """Learn anew what everybody sees: the numbers since when they do mean nothing from here on. In `turn` only."""
        self._standing.policy.part()
        self._standing.reloads += 1
        async for _ in self._join_anew(number):
            pass

    async def _join_anew(self, number: int) -> AsyncIterator[tuple[Member, Member]]:
        """Give every connection another member, since the policy has forgotten all; yields both, old and new."""
        breath = Breath()
        for connection in tuple(self._standing.connections):
            if connection not in self._standing.connections:
                continue  # closed meanwhile
            for subscription in connection.subscriptions.values():
                self._fall_behind(subscription, number - 1)
            before, connection.member = connection.member, self._standing.policy.join(connection.claims)
            self._standing.policy.leave(before)
            yield before, connection.member
            await breath.take()

    async def _collect(self, item: Prepared, audience: Audience, pending: Pending, breath: Breath) -> None:
        await breath.take()
        body = item.entry.body
        for subscription in self._standing.directory.of(audience.doubtful) if audience.doubtful else ():
            self._fall_behind(subscription, item.entry.number - 1)
            await breath.take()
        if isinstance(body, Control):
            self._standing.meet(item.entry)
            for subscription in self._standing.directory.all(body.table) if body.reason is not None else ():
                if self._must_pass(item.entry, body, subscription):
                    self._fall_behind(subscription, item.entry.number - 1)
                await breath.take()
            return
        for members, old, new in _groups(body, audience):
            plain = form_of(body, old, new)
            for connection, subscriptions in self._standing.directory.readers(members, body.relation.name):
                if len(subscriptions) == 1 and isinstance(plain, Form) and _simple(subscriptions[0]):
                    columns = connection.member.columns.get(body.relation.name)
                    message = item.message(self._standing.epoch, plain, connection.sink.encoding, columns)
                    pending.setdefault(connection, []).append(message)
                else:
                    self._each(item, body, subscriptions, (old, new), pending)
                await breath.take()

    def _must_pass(self, entry: Entry, control: Control, subscription: Subscription) -> bool:
        """Whether a reader at the end is to pass a control as one that reads on does."""
        if control.kind == "resync":
            return subscription.concerns(control)
        return not self._standing.has_told(entry, subscription)

    def _each(
        self,
        item: Prepared,
        change: Change,
        subscriptions: Iterable[Subscription],
        verdict: tuple[bool | None, bool | None],
        pending: Pending,
    ) -> None:
        """Several subscriptions of one connection: one message for those that are shown the same."""
        table = change.relation.name
        same: dict[tuple[Form, tuple[str, ...] | None], list[Subscription]] = {}
        for subscription in subscriptions:
            if subscription.state is not State.AT_END:
                continue
            form = _form(subscription, change, verdict)
            if form is None:
                continue
            if isinstance(form, Unknown) or subscription.by_hand is not None:
                self._standing.counters.undecided += form is UNKNOWN
                self._fall_behind(subscription, item.entry.number - 1)
            elif subscription.id is None:
                same.setdefault((form, subscription.shown(table)), []).insert(0, subscription)
            else:
                same.setdefault((form, subscription.shown(table)), []).append(subscription)
        for (form, columns), alike in same.items():
            connection = alike[0].connection
            messages = pending.setdefault(connection, [])
            if alike[0].id is None:  # the one made by the address is told without ids, on its own
                messages.append(item.message(self._standing.epoch, form, connection.sink.encoding, columns))
            if ids := tuple(s.id for s in alike if s.id is not None):
                messages.append(item.message(self._standing.epoch, form, connection.sink.encoding, columns, ids))

    def _fall_behind(self, subscription: Subscription, number: int) -> None:
        if subscription.state is State.AT_END:
            self._standing.depart(subscription, number, State.BEHIND)
            self._resume(subscription)

    async def _write(self, pending: Pending, number: int, breath: Breath) -> None:
        counters = self._standing.counters
        now = self._loop.time()
        for connection, messages in pending.items():
            connection.sink.write(messages)
            connection.written = number
            connection.sent_at = now
            counters.delivered += len(messages)
            if connection.sink.full:
                self._block(connection, number)
            await breath.take()

    def _block(self, connection: Connection, number: int) -> None:
        for subscription in connection.subscriptions.values():
            if subscription.state is State.AT_END:
                self._standing.depart(subscription, number, State.BLOCKED)
                self._standing.counters.fell_behind += 1


def _form(
    subscription: Subscription, change: Change, verdict: tuple[bool | None, bool | None]
) -> Form | Unknown | None:
    """What it is sent of a change; unknown also if its filter says nothing of it: who reads on finds out why."""
    try:
        return subscription.form(change, *verdict)
    except BadRequestError:
        return UNKNOWN


def _simple(subscription: Subscription) -> bool:
    return (
        subscription.id is None
        and subscription.plain
        and subscription.columns is None
        and subscription.by_hand is None
        and subscription.state is State.AT_END
    )


class Reload(NamedTuple):
    """Policies must be read again before an entry, and what follows, is decided."""

    table: str
    number: int


def runs(prepared: Sequence[Prepared]) -> Iterator[list[Prepared] | Reload]:
    """Entries, and before each transaction that may have changed policies, wherever it says so, that effect."""
    run: list[Prepared] = []
    for _, alike in groupby(prepared, lambda item: transaction_of(item.entry)):
        transaction = list(alike)
        bodies = (item.entry.body for item in transaction)
        changed = list({body.table for body in bodies if isinstance(body, Control) and body.kind == "catalog"})
        if changed and run:
            yield run
            run = []
        if changed:
            yield Reload(changed[0] if len(changed) == 1 else "*", transaction[0].entry.number)
        run += transaction
    if run:
        yield run


def _groups(change: Change, audience: Audience) -> Iterator[tuple[Set[Member], bool | None, bool | None]]:
    """Members who see the same of a change, with what they see."""
    if audience.unknown:
        yield audience.unknown, None, None
    if change.operation == "INSERT":
        yield audience.new, False, True
    elif change.operation == "DELETE":
        yield audience.old, True, False
    else:
        yield audience.old & audience.new, True, True
        yield audience.new - audience.old - audience.unsure, False, True
        yield audience.unsure, None, True
        yield audience.old - audience.new, True, False


def touches(entry: Entry, tables: Set[str]) -> bool:
    """Whether an entry can matter to a reader of these tables."""
    body = entry.body
    if isinstance(body, Change):
        return body.relation.name in tables
    return body.kind == "resync" and (body.table == "*" or body.table in tables)
