"""One client link as the hub sees it: a sink, the claims that hold for it, and its subscriptions.

Layer: core. May import: words, policy.base, wire, hub.base, hub.subscription, hub.window.
"""

import secrets
from collections.abc import Iterable

from realtime_bridge.claims import Claims
from realtime_bridge.hub.base import Sink
from realtime_bridge.hub.subscription import State, Subscription
from realtime_bridge.hub.window import wrap
from realtime_bridge.policy.base import Member


class Connection:
    """One client link. Made by `Hub.open`, ended by `Hub.close`; an idle one holds no task and no queue.

    Attributes:
        written: the newest number that a fan-out in progress has already written here.
        sent_at, heard_at: when something last went out and came in, in the loop's time.
        lasting: whether time is looked after here: pings, dead peers, tokens that end.
        warned: whether `auth_expiring` was sent for the present claims.
    """

    __slots__ = (
        "claims",
        "heard_at",
        "id",
        "lasting",
        "member",
        "pinged_at",
        "sent_at",
        "sink",
        "subscriptions",
        "warned",
        "written",
    )

    def __init__(self, sink: Sink, claims: Claims, member: Member, now: float, *, lasting: bool) -> None:
        self.id = secrets.token_hex(8)
        self.sink = sink
        self.claims = claims
        self.member = member
        self.subscriptions: dict[str | None, Subscription] = {}
        self.written = 0
        self.sent_at = self.heard_at = self.pinged_at = now
        self.warned = False
        self.lasting = lasting

    def send(self, message: bytes, position: str = "") -> None:
        """Write one JSON message that is this connection's own."""
        self.sink.write([wrap(self.sink.encoding, message, position)])

    def number(self, end: int) -> int:
        """The number up to which every subscription of it was sent what it is shown, where `end` is the hub's own."""
        end = max(end, self.written)
        return min((subscription.sent_to(end) for subscription in self.subscriptions.values()), default=end)

    def behind(self) -> Iterable[Subscription]:
        """Its subscriptions that are not at the end."""
        return (s for s in self.subscriptions.values() if s.state is not State.AT_END)
