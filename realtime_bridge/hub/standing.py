"""Where this process stands in the history, and who stands there with it: what the parts of the hub share.

Layer: core. May import: words, policy.base, hub.*.
"""

import asyncio
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from realtime_bridge.change import Control, Entry, Position
from realtime_bridge.hub.audience import Directory
from realtime_bridge.hub.proof import Proof
from realtime_bridge.hub.subscription import State, Subscription
from realtime_bridge.hub.window import Window
from realtime_bridge.policy.base import Policy

if TYPE_CHECKING:
    from realtime_bridge.hub.connection import Connection

NOWHERE: Final = "nowhere-0"
"""The position of a reader that is owed a resync: of no history, so that whoever comes back with it is told again."""
WINDOW_SIZE: Final = 20_000
WINDOW_BYTES: Final = 64 * 2**20


class Altered(NamedTuple):
    """That the rights of a table were found to be others.

    Attributes:
        at: when, in the loop's time.
        until: the number of the next entry that tells of such a thing, once that was met: it is taken for this one.
    """

    at: float
    until: float = inf


@dataclass
class Counters:
    """What the hub has done since it began; read by metrics."""

    delivered: int = 0
    entries: int = 0
    entry_bytes: int = 0
    resyncs: int = 0
    fell_behind: int = 0
    undecided: int = 0
    caught_up_from_broker: int = 0


@dataclass
class Standing:
    """Where this process stands.

    Attributes:
        tables: every table that can be subscribed to.
        replays: as in `Hub`.
        epoch, number: everything up to here is decided and sent to those at the end.
        proof: up to when nothing is missing.
        generation: grows when numbers that were seen stop being valid; what was read before is then thrown away.
        reloads: grows when policies were read again; what was decided before is then thrown away.
        altered: table → when its rights were last found to be others, unless they could not be read since.
        reshaped: table → when its columns were last found to be others, by the monotonic clock.
        turn: held while messages are handed to sinks, by the fan-out for a batch, by a reader for a slice.
        following: whether the broker is being followed now.
    """

    policy: Policy
    tables: tuple[str, ...] = ()
    replays: bool = True
    epoch: str = ""
    number: int = 0
    generation: int = 0
    reloads: int = 0
    following: bool = False
    altered: dict[str, Altered] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)
    reshaped: dict[str, float] = field(default_factory=dict)
    window: Window = field(default_factory=lambda: Window(size=WINDOW_SIZE, max_bytes=WINDOW_BYTES))
    connections: set["Connection"] = field(default_factory=set)
    directory: Directory = field(default_factory=Directory)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    counters: Counters = field(default_factory=Counters)

    def subscriptions(self) -> list[Subscription]:
        """Those of every connection."""
        return [s for connection in self.connections for s in connection.subscriptions.values()]

    def position(self, number: int, told: int = 0) -> str:
        """A number as clients know it; `told` as in `Position`."""
        return str(Position(self.epoch, number, told))

    def has_told(self, entry: Entry, subscription: Subscription) -> bool:
        """Whether a reader was told here of the altered rights that an entry tells, since they were found."""
        body = entry.body
        if not isinstance(body, Control) or body.kind != "catalog":
            return False
        found, told = self.altered.get(body.table), subscription.told
        if found is None or entry.number > found.until:
            return False
        return max(told.get(body.table, -inf), told.get("*", -inf)) >= found.at

    def meet(self, entry: Entry) -> None:
        """An entry is being fanned out: of what was found until now, it is the one that tells."""
        body = entry.body
        if isinstance(body, Control) and body.kind == "catalog" and body.reason is not None:
            found = self.altered.get(body.table)
            if found is not None and found.until == inf:
                self.altered[body.table] = Altered(found.at, entry.number)

    def arrive(self, subscription: Subscription) -> None:
        """A subscription has examined everything: from now on it is written to directly. Only within `turn`."""
        subscription.state = State.AT_END
        self.directory.add(subscription)

    def depart(self, subscription: Subscription, number: int, state: State) -> None:
        """A subscription at the end stays behind at a number."""
        assert subscription.state is State.AT_END, "only what is at the end departs from it"
        self.directory.remove(subscription)
        subscription.number = number
        subscription.state = state
