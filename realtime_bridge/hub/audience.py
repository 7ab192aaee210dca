"""Which subscriptions stand at the end, by member and table: the way from an audience to its sinks.

Layer: core. May import: words, policy.base, hub.subscription.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from realtime_bridge.hub.subscription import Subscription
from realtime_bridge.policy.base import Member

if TYPE_CHECKING:
    from realtime_bridge.hub.connection import Connection

_ByConnection = dict["Connection", tuple[Subscription, ...]]


class Directory:
    """Subscriptions at the end, found in time proportional to what is found.

    Every iteration works on copies, so that subscriptions may come and go meanwhile.
    """

    def __init__(self) -> None:
        self._members: dict[Member, dict[str, _ByConnection]] = {}
        self.count = 0

    def add(self, subscription: Subscription) -> None:
        """Enter a subscription under its connection's member."""
        tables = self._members.setdefault(subscription.connection.member, {})
        for table in subscription.tables:
            connections = tables.setdefault(table, {})
            present = connections.get(subscription.connection, ())
            connections[subscription.connection] = (*present, subscription)
        self.count += 1

    def remove(self, subscription: Subscription) -> None:
        """Take a subscription out; its connection's member must be the one it was entered under."""
        connection = subscription.connection
        tables = self._members[connection.member]
        for table in subscription.tables:
            left = tuple(other for other in tables[table][connection] if other is not subscription)
            if left:
                tables[table][connection] = left
                continue
            del tables[table][connection]
            if not tables[table]:
                del tables[table]
        if not tables:
            del self._members[connection.member]
        self.count -= 1

    def readers(self, members: Iterable[Member], table: str) -> Iterator[tuple["Connection", tuple[Subscription, ...]]]:
        """Connections of these members that read a table, each with its subscriptions."""
        for member in tuple(members):
            tables = self._members.get(member)
            if tables is not None and (connections := tables.get(table)):
                yield from tuple(connections.items())

    def all(self, table: str) -> list[Subscription]:
        """Every subscription that reads a table (`*`: any)."""
        found: dict[Subscription, None] = {}
        for tables in self._members.values():
            for name, connections in tables.items():
                if table in ("*", name):
                    found.update((s, None) for subscriptions in connections.values() for s in subscriptions)
        return list(found)
