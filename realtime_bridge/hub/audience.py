"""Which subscriptions stand at the end, by member and table: the way from an audience to its sinks.

Layer: core. May import: words, policy.base, hub.subscription.
"""

from collections.abc import Iterator, Set
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
        self._tables: dict[str, dict[Member, _ByConnection]] = {}
        self.count = 0

    def add(self, subscription: Subscription) -> None:
        """Enter a subscription under its connection's member."""
        connection = subscription.connection
        for table in subscription.tables:
            connections = self._tables.setdefault(table, {}).setdefault(connection.member, {})
            connections[connection] = (*connections.get(connection, ()), subscription)
        self.count += 1

    def remove(self, subscription: Subscription) -> None:
        """Take a subscription out; its connection's member must be the one it was entered under."""
        connection = subscription.connection
        for table in subscription.tables:
            members = self._tables[table]
            connections = members[connection.member]
            left = tuple(other for other in connections[connection] if other is not subscription)
            if left:
                connections[connection] = left
                continue
            del connections[connection]
            if not connections:
                del members[connection.member]
            if not members:
                del self._tables[table]
        self.count -= 1

    def readers(self, members: Set[Member], table: str) -> Iterator[tuple["Connection", tuple[Subscription, ...]]]:
        """Connections of these members that read a table, each with its subscriptions."""
        present = self._tables.get(table, {})
        for member in present.keys() & members:
            yield from tuple(present.get(member, {}).items())

    def of(self, members: Set[Member]) -> Iterator[Subscription]:
        """Every subscription of these members, once for each of its tables."""
        for table in tuple(self._tables):
            for _, subscriptions in self.readers(members, table):
                yield from subscriptions

    def all(self, table: str) -> Iterator[Subscription]:
        """Every subscription that reads a table (`*`: any), once for each such table."""
        for name in tuple(self._tables) if table == "*" else (table,):
            for connections in tuple(self._tables.get(name, {}).values()):
                for subscriptions in tuple(connections.values()):
                    yield from subscriptions
