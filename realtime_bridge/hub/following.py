"""Following the history: what is new is fanned out, and what is lost or cut off is put right for every reader.

Layer: core. May import: words, broker.base, hub.*.
"""

import asyncio
import logging
from typing import Final

from realtime_bridge.broker.base import Broker, Update
from realtime_bridge.change import Position
from realtime_bridge.errors import BrokerError, HistoryGoneError
from realtime_bridge.hub.breath import Breath
from realtime_bridge.hub.catch_up import CatchUp
from realtime_bridge.hub.fan_out import FanOut
from realtime_bridge.hub.standing import Standing

logger = logging.getLogger(__name__)

_BACKOFF_SECONDS: Final = 0.25
_READ: Final = 500
_LOOK_BACK: Final = 5_000
"""Entries from before it began that a process holds at most."""


class Following:
    """Moves a process along the history.

    Attributes:
        begun: set once the process stands somewhere in it.
    """

    def __init__(self, standing: Standing, broker: Broker, fan_out: FanOut, catch_up: CatchUp) -> None:
        self.begun = asyncio.Event()
        self._standing = standing
        self._broker = broker
        self._fan_out = fan_out
        self._catch_up = catch_up
        self._failed = False
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Follow the history, for ever."""
        while True:
            try:
                async with self._broker.follow() as updates:
                    async for update in updates:
                        await self._apply(update)
                        self._standing.following = True
            except BrokerError as error:
                if self._standing.following or not self.begun.is_set():
                    logger.warning("broker lost, following again", extra={"reason": str(error)})
            except Exception:  # a fault of ours: what comes next is where the following begins anew
                logger.exception("following failed, readers are told to resync")
                self._failed = True
            self._standing.following = False
            await asyncio.sleep(_BACKOFF_SECONDS)

    async def _apply(self, update: Update) -> None:
        standing = self._standing
        if not self.begun.is_set():
            await standing.policy.reload("*")  # what was read before may lack what the history told until here
            standing.epoch, standing.number = update.epoch, update.number
            standing.window.reset(update.number)
            await self._look_back()
            self.begun.set()
        elif update.kind == "fork":
            await self._fork(update.epoch, update.number)
        elif update.kind == "lost":
            await self._lost(update.epoch, update.number)
        else:
            await self._reconcile(update)
            await self._extend(update)
        standing.proof.tell(update.proven_until, self._loop.time())

    async def _look_back(self) -> None:
        """Hold what came lately: those who were served elsewhere come back together, and would each read it alone."""
        window = self._standing.window
        while 1 < window.first > self._standing.number - _LOOK_BACK:
            after = max(0, window.first - 1 - _READ)
            try:
                entries = await self._broker.read(after, limit=window.first - 1 - after)
            except HistoryGoneError:
                return
            if not window.precede(entries):
                return

    async def _reconcile(self, update: Update) -> None:
        """After following anew: get from where this process stood to where the update begins."""
        standing = self._standing
        begins = update.number - len(update.entries)
        if self._failed:  # whatever it was that failed must not be met again: pass it, and tell everybody
            await self._lost(update.epoch, begins)
            self._failed = False
        if update.epoch == standing.epoch and begins == standing.number:
            return
        try:
            if update.epoch != standing.epoch:
                number = await self._broker.locate(Position(standing.epoch, standing.number))
                await self._fork(update.epoch, number)
            while standing.number < begins:
                entries = await self._broker.read(standing.number, limit=min(_READ, begins - standing.number))
                known = standing.window.last_id()
                if not entries or (known is not None and entries[0].previous != known):
                    raise HistoryGoneError("the history is not the continuation of what was seen")
                await self._deliver(Update("entries", update.epoch, entries[-1].number, tuple(entries)))
            if begins < standing.number and update.number < standing.number:
                raise HistoryGoneError("the history ends before what was seen")
        except HistoryGoneError:
            await self._lost(update.epoch, begins)

    async def _extend(self, update: Update) -> None:
        new = tuple(entry for entry in update.entries if entry.number > self._standing.number)
        if new:
            await self._deliver(Update("entries", update.epoch, update.number, new))

    async def _deliver(self, update: Update) -> None:
        await self._fan_out.deliver(self._standing.window.extend(update.entries))
        self._catch_up.moved()

    async def _fork(self, epoch: str, number: int) -> None:
        """Everything after a number never happened; whoever had read further rewinds to it, or is told to resync."""
        standing = self._standing
        async with standing.turn:
            standing.epoch = epoch
            if number >= standing.number:
                return
            logger.warning("the history was cut back", extra={"epoch": epoch, "entries": standing.number - number})
            standing.generation += 1
            for subscription in () if standing.replays else standing.subscriptions():
                if subscription.sent_to(standing.number) > number:
                    self._catch_up.owe(subscription, "history_gone")
            standing.number = number
            standing.window.cut(number)
            for subscription in standing.subscriptions():
                subscription.number = min(subscription.number, number)
                subscription.covered.clear()
            for connection in standing.connections:
                connection.written = min(connection.written, number)
            await self._fan_out.renew(number + 1)
        self._catch_up.moved()

    async def _lost(self, epoch: str, number: int) -> None:
        """The history is gone: everybody is told to read again."""
        standing, breath = self._standing, Breath()
        logger.warning("the history is gone, readers are told to resync", extra={"epoch": epoch})
        async with standing.turn:
            for subscription in standing.subscriptions():
                self._catch_up.owe(subscription, "history_gone")
                await breath.take()
            standing.generation += 1
            standing.epoch, standing.number = epoch, number
            standing.window.reset(number)
            for connection in standing.connections:
                connection.written = 0
            await self._fan_out.reload("*", number + 1)  # a control may be among what is gone
            await self._fan_out.renew(number + 1)
            for subscription in standing.subscriptions():
                if subscription.owed is None:  # it has come meanwhile
                    self._catch_up.owe(subscription, "history_gone")
        self._catch_up.moved()
