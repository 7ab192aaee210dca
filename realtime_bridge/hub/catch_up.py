"""Reading on: from a position to the end, for one subscription, a bounded slice at a time.

First connect, reconnect, long poll, a sink that had no room, a resync that had to wait: all are this. Entries come from
the window, or from the broker when they are older; what is read is authorised now; whoever has examined everything is
at the end, and the fan-out takes over.

Layer: core. May import: words, broker.base, policy.base, wire, hub.*.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from itertools import islice
from typing import Final

from realtime_bridge.broker.base import Broker
from realtime_bridge.change import Change, ResyncReason
from realtime_bridge.errors import BadRequestError, BrokerError, HistoryGoneError
from realtime_bridge.hub.passing import is_over, to_read_again, told_by_controls
from realtime_bridge.hub.settler import Settler
from realtime_bridge.hub.standing import Standing
from realtime_bridge.hub.subscription import SPREAD_SECONDS, UNKNOWN, UNSURE, State, Subscription, Unknown, check_filter
from realtime_bridge.hub.window import Prepared, wrap
from realtime_bridge.policy.base import Member, Verdict
from realtime_bridge.wire import native
from realtime_bridge.wire.native import Form

logger = logging.getLogger(__name__)

SLICE: Final = 128
"""Entries examined at once for one reader."""
READERS: Final = 4
"""Slices read at the same time, by hand or not: what old positions may cost the broker, and one turn of the loop."""
_RETRY_SECONDS: Final = 0.5
_SETTLE_SECONDS: Final = 3.0
_SPREAD_MS_PER_CONNECTION: Final = 2


class CatchUp:
    """Advances subscriptions that are behind.

    Args:
        slice_bytes: messages written to one sink before others get a turn.
        resync_seconds: at most one resync per subscription and table in this time.
    """

    def __init__(
        self, standing: Standing, broker: Broker, settler: Settler, *, slice_bytes: int, resync_seconds: float
    ) -> None:
        self._standing = standing
        self._broker = broker
        self._settler = settler
        self._slice_bytes = slice_bytes
        self._resync_seconds = resync_seconds
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Queue[Subscription] = asyncio.Queue()  # each subscription at most once: by its state
        self._ahead: set[Subscription] = set()
        self._reading = asyncio.Semaphore(READERS)

    def resume(self, subscription: Subscription) -> None:
        """Have a subscription read on: soon, or, if it is advanced by hand, by whoever does that."""
        subscription.state = State.BEHIND
        if not self._settler.is_settled(subscription.connection.member):
            self._settler.settle(subscription.connection.member)  # now, so that all who wait are one question
        if subscription.by_hand is not None:
            subscription.by_hand()
        else:
            self._waiting.put_nowait(subscription)

    def step_back(self, subscription: Subscription) -> None:
        """Have a subscription at the end arrive there anew. Only within `turn`."""
        if subscription.state is State.AT_END:
            self._standing.depart(subscription, self._standing.number, State.BEHIND)
            self.resume(subscription)

    def owe(self, subscription: Subscription, reason: ResyncReason) -> None:
        """Have a subscription told to resync before anything else. Only within `turn`."""
        subscription.owed = reason
        self.step_back(subscription)

    def moved(self) -> None:
        """The hub's number has changed: those who were ahead of it may go on."""
        ahead, self._ahead = self._ahead, set()
        for subscription in ahead:
            if subscription.state is State.AHEAD:
                self.resume(subscription)

    async def work(self) -> None:
        """Advance whoever is behind, for ever. Run `READERS` of these."""
        while True:
            subscription = await self._waiting.get()
            if subscription.state is not State.BEHIND:
                continue
            try:
                await self.advance(subscription)
            finally:  # also when this is cancelled: whoever runs the hub again finds it waiting
                if subscription.state is State.BEHIND:
                    self._waiting.put_nowait(subscription)

    async def advance(self, subscription: Subscription, *, most: int = SLICE) -> int:
        """Read one slice and write what the reader may see of it, at most `most` messages.

        Returns how many messages were written. Afterwards the state says what to wait for; BEHIND means that there
        is more to do at once. Raises nothing: a broker that does not answer is asked again later, and a fault of ours
        costs this reader a resync.
        """
        if self._standing.policy.has_expired(subscription.connection.member):
            await self._expire(subscription.connection.member)
        if not self._settler.is_settled(subscription.connection.member) and not await self._settle(subscription):
            return 0
        try:
            async with self._reading:
                await asyncio.sleep(0)  # what comes from the window waits for nothing, and others want their turn, too
                return await self._advance(subscription, most)
        except BrokerError:
            self._hold(subscription, _RETRY_SECONDS)
        except Exception:
            logger.exception("reading on failed", extra={"connection": subscription.connection.id})
            self._excuse(subscription)
        return 0

    async def _expire(self, member: Member) -> None:
        """Have a member learned anew; those of its readers who are at the end read on from there afterwards."""
        standing = self._standing
        async with standing.turn:
            if not standing.policy.expire(member):
                return
            for other in tuple(standing.directory.of({member})):
                self.step_back(other)

    async def _settle(self, subscription: Subscription) -> bool:
        """Whether the reader's member is settled now; if not, the reader is held until it is.

        One that is advanced by hand waits for a while; all others are waiting already, and nobody waits for them.
        """
        settled = self._settler.settle(subscription.connection.member)
        if subscription.by_hand is not None:
            await asyncio.wait((settled,), timeout=_SETTLE_SECONDS)
        if settled.done():
            return True
        if subscription.state is State.BEHIND:
            subscription.state = State.HELD
            settled.add_done_callback(lambda _: self._release(subscription))
        return False

    async def _advance(self, subscription: Subscription, most: int) -> int:
        """Decide and write, part by part, until something was written: nothing is decided that is not passed now."""
        standing, member = self._standing, subscription.connection.member
        began = self._basis(subscription)
        items = await self._read(subscription)
        for part in _parts(items, self._slice_bytes) or [()]:
            verdicts = await standing.policy.verdicts([item.entry for item in part], member)
            async with standing.turn:
                written = self._write_if_it_holds(subscription, part, verdicts, most, began)
            if written or not part or subscription.number != part[-1].entry.number:
                return written
            await asyncio.sleep(0)
        return 0

    def _write_if_it_holds(
        self,
        subscription: Subscription,
        items: Sequence[Prepared],
        verdicts: Sequence[Verdict],
        most: int,
        began: tuple[object, ...],
    ) -> int:
        """Write what was read and decided, unless that has been overtaken; returns how many messages were written."""
        connection = subscription.connection
        if began != self._basis(subscription):
            return 0
        if not self._settler.is_settled(connection.member) or subscription.state is not State.BEHIND:
            return 0
        if connection.sink.full:  # by another subscription of the connection
            subscription.state = State.BLOCKED
            return 0
        return self._write(subscription, items, verdicts, most)

    def _basis(self, subscription: Subscription) -> tuple[object, ...]:
        """What must not have changed between reading, deciding and writing."""
        standing, member = self._standing, subscription.connection.member
        return standing.generation, standing.reloads, member, member.learned

    def _excuse(self, subscription: Subscription) -> None:
        """After a fault: what could not be read or encoded is told as a resync; if not even that can be, it ends."""
        if subscription.owed is None:
            subscription.owed = "history_gone"
            return
        subscription.state = State.ENDED
        subscription.connection.sink.close(1011, "internal error")

    async def _read(self, subscription: Subscription) -> list[Prepared]:
        standing = self._standing
        if subscription.owed is not None or subscription.number >= standing.number:
            return []
        items = standing.window.after(subscription.number, SLICE)
        if items is None:
            standing.counters.caught_up_from_broker += 1
            try:
                items = [Prepared(e) for e in await self._broker.read(subscription.number, limit=SLICE)]
            except HistoryGoneError:
                subscription.owed = "history_gone"
                return []
        return [item for item in items if item.entry.number <= standing.number]

    def _write(
        self, subscription: Subscription, items: Sequence[Prepared], verdicts: Sequence[Verdict], most: int
    ) -> int:
        out: list[bytes] = []
        if subscription.fresh is not None:
            subscription.see_if_fresh()
        if subscription.owed is not None:
            self._pay(subscription, out)
        refusal: BadRequestError | None = None
        try:
            self._examine(subscription, list(zip(items, verdicts, strict=True)), most, out)
        except BadRequestError as error:
            refusal = error
        end = self._standing.number
        is_through = subscription.number == end and subscription.owed is None
        if is_through and self._tell_of_changes(to_read_again(subscription, end + 1), subscription, None, out):
            subscription.see()
        if out:
            connection = subscription.connection
            connection.sink.write(out)
            connection.sent_at = self._loop.time()
            self._standing.counters.delivered += len(out)
        if refusal is not None:
            self._refuse(subscription, refusal)
        else:
            self._place(subscription)
        return len(out)

    def _examine(
        self, subscription: Subscription, decided: Sequence[tuple[Prepared, Verdict]], most: int, out: list[bytes]
    ) -> None:
        """Pass entries, appending what is shown of them, until there is enough or the reader must be held.

        Raises:
            BadRequestError: as `_form`. Everything before the entry is passed.
        """
        size, counted = 0, len(out)
        is_current = subscription.is_current
        for i, (item, verdict) in enumerate(decided):
            changed = frozenset() if self._standing.has_told(item.entry, subscription) else verdict.changed
            if changed or not is_current:
                told_anyway = told_by_controls(subscription, islice(decided, i, None))
                altered = to_read_again(subscription, item.entry.number, changed, told_anyway)
                if not self._tell_of_changes(altered, subscription, (item, verdict), out):
                    return
            if not (is_over(subscription, item, verdict) or self._show(subscription, item, verdict, out)):
                return
            subscription.number = item.entry.number
            if len(out) > counted:
                counted = len(out)
                size += len(out[-1])
            if counted >= most or size > self._slice_bytes:
                return

    def _tell_of_changes(
        self,
        altered: Sequence[str],
        subscription: Subscription,
        decided: tuple[Prepared, Verdict] | None,
        out: list[bytes],
    ) -> bool:
        """Append a resync for each of these tables, before the reader passes an entry, or at the end.

        Whoever comes back with the position of the last one is not told of any again: it is where the reader stands
        then, behind the entry if nothing more is shown of that.

        Returns False if the reader must be held where it is.
        """
        for table in altered:
            reason = self._reason(subscription, table)
            if not self._cover(subscription, table):
                return False
            number, told = subscription.number, 0
            if table == altered[-1]:
                if decided is not None and is_over(subscription, *decided):
                    number = decided[0].entry.number
                told = subscription.told_at(number)
            self._append_resync(subscription, table, reason, self._standing.position(number, told), out)
        return True

    def _reason(self, subscription: Subscription, table: str) -> ResyncReason:
        """Of a member that sees a table otherwise: its columns are others since its reader read it, or else rights."""
        read = max(subscription.began, subscription.told.get(table, 0.0))
        return "schema_changed" if self._standing.reshaped.get(table, 0.0) > read else "visibility_changed"

    def _show(self, subscription: Subscription, item: Prepared, verdict: Verdict, out: list[bytes]) -> bool:
        """Append what the reader is shown of one entry; False if it must be held before it."""
        body = item.entry.body
        if not isinstance(body, Change):
            return self._resync(subscription, body.table, body.reason or "upstream_gap", item.entry.number, out)
        table = body.relation.name
        form = self._form(subscription, body, verdict)
        if isinstance(form, Unknown):
            self._standing.counters.undecided += form is UNKNOWN
            return self._resync(subscription, table, "visibility_changed", item.entry.number, out)
        if form is not None:
            encoding = subscription.connection.sink.encoding
            columns = subscription.shown(table)
            out.append(item.message(self._standing.epoch, form, encoding, columns, subscription.ids))
        return True

    def _form(self, subscription: Subscription, change: Change, verdict: Verdict) -> Form | Unknown | None:
        """As `Subscription.form`, but unknown where a filter says nothing of a change because that one is older.

        Raises:
            BadRequestError: the subscription's filter can hold no more.
        """
        try:
            return subscription.form(change, verdict.old, verdict.new)
        except BadRequestError:
            assert subscription.filter is not None, "nothing else is refused"
            claims, policy = subscription.connection.claims, self._standing.policy
            if not check_filter(subscription.filter, change.relation.name, claims, policy):
                raise
            return UNKNOWN

    def _refuse(self, subscription: Subscription, error: BadRequestError) -> None:
        """End a subscription before what it cannot read, and tell why; what the address asked for ends the connection.

        Its number stays, so that no position passes what was not decided.
        """
        connection = subscription.connection
        logger.info("subscription refused", extra={"connection": connection.id, "reason": error.detail})
        subscription.state = State.ENDED
        if subscription.id is None:
            connection.sink.close(error.close_code, error.detail)
        else:
            del connection.subscriptions[subscription.id]
            connection.send(native.error(error.close_code, error.detail, subscription.id))

    def _pay(self, subscription: Subscription, out: list[bytes]) -> None:
        """Send the resync that stands for everything up to the hub's number."""
        assert subscription.owed is not None, "only called when one is owed"
        table = next(iter(subscription.tables)) if len(subscription.tables) == 1 else "*"
        if self._cover(subscription, table):
            reason, subscription.owed = subscription.owed, None
            number = subscription.number = self._standing.number
            position = self._standing.position(number, subscription.told_at(number))
            self._append_resync(subscription, table, reason, position, out)

    def _resync(
        self, subscription: Subscription, table: str, reason: ResyncReason, number: int, out: list[bytes]
    ) -> bool:
        """Append a resync, unless the reader must be held before it: then return False."""
        if not self._cover(subscription, table):
            return False
        told = UNSURE if subscription.tables & subscription.connection.member.unknown else 0
        self._append_resync(subscription, table, reason, self._standing.position(number, told), out)
        return True

    def _cover(self, subscription: Subscription, table: str) -> bool:
        """Take it that a resync is told now, unless the last one is too recent: then hold the reader, and return False.

        The reader reads the table after it is told, and so sees everything up to the hub's number, as its member sees
        it now; changes of the table up to there need not be sent any more.
        """
        now = self._loop.time()
        wait = subscription.told.get(table, -self._resync_seconds) + self._resync_seconds - now
        if wait > 0:
            self._hold(subscription, wait)
            return False
        subscription.told[table] = now
        for name in subscription.tables if table == "*" else (table,):
            subscription.covered[name] = self._standing.number
            subscription.see(name)
        return True

    def _append_resync(
        self, subscription: Subscription, table: str, reason: ResyncReason, position: str, out: list[bytes]
    ) -> None:
        spread = min(int(SPREAD_SECONDS * 1000), _SPREAD_MS_PER_CONNECTION * len(self._standing.connections))
        message = native.resync(table, reason, position, random.randint(0, spread), subscription.ids)
        out.append(wrap(subscription.connection.sink.encoding, message, position))
        self._standing.counters.resyncs += 1

    def _hold(self, subscription: Subscription, seconds: float) -> None:
        if subscription.state is State.BEHIND:
            subscription.state = State.HELD
            self._loop.call_later(seconds, self._release, subscription)

    def _release(self, subscription: Subscription) -> None:
        if subscription.state is State.HELD:
            self.resume(subscription)

    def _place(self, subscription: Subscription) -> None:
        if subscription.state is State.HELD:
            return
        if subscription.number > self._standing.number:
            subscription.state = State.AHEAD
            self._ahead.add(subscription)
        elif subscription.connection.sink.full:
            subscription.state = State.BLOCKED
        elif subscription.number == self._standing.number and subscription.owed is None:
            self._standing.arrive(subscription)


def _parts(items: Sequence[Prepared], most_bytes: int) -> list[Sequence[Prepared]]:
    """The same entries in parts, each ending with the one that fills it."""
    parts: list[Sequence[Prepared]] = []
    first = size = 0
    for i, item in enumerate(items, 1):
        size += item.entry.size
        if size >= most_bytes or i == len(items):
            parts.append(items[first:i])
            first, size = i, 0
    return parts
