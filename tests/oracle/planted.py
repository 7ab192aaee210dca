"""Faults of the bridge itself, planted one at a time in its processes before they begin: the judge must find each.

Every function here is called in a bridge's process and changes what the bridge is. Where there is nothing to change any
more, the fault has to be planted elsewhere.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from realtime_bridge.broker import redis, redis_link
from realtime_bridge.change import Change
from realtime_bridge.errors import LeaseLostError
from realtime_bridge.hub import fan_out, subscription
from realtime_bridge.hub.following import Following
from realtime_bridge.hub.hub import Hub
from realtime_bridge.policy.base import Audience
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.knowledge import Knowledge
from realtime_bridge.sources.assembler import Assembler
from realtime_bridge.sources.transactions import BodyBuilder
from realtime_bridge.wire.native import Form


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of an attribute in its place."""
    setattr(owner, name, make(getattr(owner, name)))


def _skip_numbers(collect: Any) -> Any:
    async def mutated(self: Any, item: Any, *arguments: Any) -> None:
        if item.entry.number % 7:
            await collect(self, item, *arguments)

    return mutated


def _forget_holes(reconcile: Any) -> Any:
    async def mutated(self: Any, update: Any) -> None:
        if update.epoch == self._standing.epoch:
            self._standing.number = update.number - len(update.entries)
            self._standing.window.reset(self._standing.number)
        await reconcile(self, update)

    return mutated


def _forget_positions(locate: Any) -> Any:
    async def mutated(self: Any, text: str | None, *arguments: Any) -> Any:
        return await locate(self, text and self.position, *arguments)

    return mutated


def _position_of_the_end(position_of: Any) -> Any:
    return lambda self, connection: self.position


def _everybody(audience: Any) -> Any:
    def mutated(self: Any, change: Change) -> Audience:
        index, _ = self._decider(change.relation)
        return audience(self, change) if index is None else Audience(index.members, index.members)

    return mutated


def _nobody_leaves(form_of: Any) -> Any:
    def mutated(*arguments: Any) -> Any:
        form = form_of(*arguments)
        return None if form is Form.LEAVE else form

    return mutated


def _entering_shows_the_old_row(form_of: Any) -> Any:
    def mutated(change: Change, old: bool | None, new: bool | None) -> Any:
        form = form_of(change, old, new)
        return Form.UPDATE if form is Form.INSERT and change.operation == "UPDATE" else form

    return mutated


def _resync_always(outdated: Any) -> Any:
    def mutated(self: Any, table: str, until: int) -> bool:
        return until % 5 == 0 or bool(outdated(self, table, until))

    return mutated


def _drop_the_last_row(build: Any) -> Any:
    def mutated(self: Any, transaction: Any, described: Any) -> Any:
        bodies = build(self, transaction, described)
        return bodies[:-1] if len(transaction.rows) > 1 else bodies

    return mutated


def _turn_round(write: Any) -> Any:
    async def mutated(self: Any, pending: Any, *arguments: Any) -> None:
        await write(self, {connection: messages[::-1] for connection, messages in pending.items()}, *arguments)

    return mutated


def _never_truncated(feed: Any) -> Any:
    def mutated(self: Any, data: bytes) -> None:
        if not data.startswith(b"T"):
            feed(self, data)

    return mutated


def _without_fence(script: Any) -> Any:
    def mutated(*arguments: str) -> Any:
        text, _ = script(*arguments)
        text = text.replace("if state.token ~= token and", "if false and")
        text = text.replace("and newest_nonce ~= state.nonce then", "and false then")  # which would refuse it, too
        return text, hashlib.sha1(text.encode()).hexdigest()

    return mutated


def _keep_a_lost_lease(keep_lease: Any) -> Any:
    async def mutated(*arguments: Any, ttl: float) -> None:
        while True:
            with suppress(LeaseLostError):
                await keep_lease(*arguments, ttl=ttl)
            await asyncio.sleep(ttl / 3)

    return mutated


def _plant_in_both(make: Callable[[Any], Any]) -> None:
    for module in (subscription, fan_out):  # it is known by name there, too
        _replace(module, "form_of", make)


def skip_numbers() -> None:
    _replace(fan_out.FanOut, "_collect", _skip_numbers)


def forget_holes() -> None:
    _replace(Following, "_reconcile", _forget_holes)


def forget_positions() -> None:
    _replace(Hub, "locate", _forget_positions)


def move_positions_on() -> None:
    _replace(Hub, "position_of", _position_of_the_end)


def deliver_to_everybody() -> None:
    _replace(PolicyEngine, "_audience", _everybody)


def ignore_memberships() -> None:
    _replace(Knowledge, "is_touched_by", lambda _: lambda self, body: False)


def tell_nobody_that_it_left() -> None:
    _plant_in_both(_nobody_leaves)


def show_old_rows() -> None:
    _plant_in_both(_entering_shows_the_old_row)


def resync_all_the_time() -> None:
    _replace(subscription.Subscription, "outdated", _resync_always)


def drop_a_row() -> None:
    _replace(BodyBuilder, "build", _drop_the_last_row)


def turn_messages_round() -> None:
    _replace(fan_out.FanOut, "_write", _turn_round)


def forget_truncates() -> None:
    _replace(Assembler, "feed", _never_truncated)


def drop_the_fence() -> None:
    """A leader that is replaced neither notices nor is refused."""
    _replace(redis_link, "_script", _without_fence)
    _replace(redis.RedisBroker, "keep_lease", _keep_a_lost_lease)


PLANTED: Final[Mapping[str, tuple[Callable[[], None], str]]] = {
    "every seventh number is skipped": (skip_numbers, ""),
    "what was missed while the broker was away is forgotten": (forget_holes, "all cut off from Valkey"),
    "whoever comes back is served from the present": (forget_positions, ""),
    "positions pass what is not written": (move_positions_on, ""),
    "everybody is told of everything": (deliver_to_everybody, ""),
    "memberships hold for ever": (ignore_memberships, ""),
    "nobody is told that a row has left": (tell_nobody_that_it_left, ""),
    "a row that enters shows what it was before": (show_old_rows, ""),
    "everybody is told to read again, all the time": (resync_all_the_time, ""),
    "the last row of a transaction is dropped": (drop_a_row, ""),
    "messages are turned round": (turn_messages_round, ""),
    "a truncated table stays as it was": (forget_truncates, ""),
    "a leader that was replaced goes on": (drop_the_fence, "leader frozen"),
}
"""What is wrong → what plants it, and the fault under which it shows, if it needs one."""
