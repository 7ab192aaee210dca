"""What a reader passes on its way: of which entries nothing is shown to it, and what it is to read again before one.

Layer: core. May import: words, policy.base, hub.{fan_out,subscription,window}.
"""

from collections.abc import Iterable, Set

from realtime_bridge.change import Change
from realtime_bridge.hub.fan_out import touches
from realtime_bridge.hub.subscription import Subscription
from realtime_bridge.hub.window import Prepared
from realtime_bridge.policy.base import Verdict


def to_read_again(
    subscription: Subscription, until: int, changed: Set[str] = frozenset(), told_anyway: Set[str] = frozenset()
) -> list[str]:
    """The tables that a reader is to read again before it passes the entry `until`.

    Those where its member sees otherwise since one up to there, and of `changed` by this one those that it has not read
    later; but none of which it is told anyway before it is shown anything.
    """
    return [
        table
        for table in subscription.tables - told_anyway
        if subscription.outdated(table, until) or (table in changed and until > subscription.covered.get(table, 0))
    ]


def told_by_controls(subscription: Subscription, decided: Iterable[tuple[Prepared, Verdict]]) -> set[str]:
    """The tables of which a reader is told by the entries that come next, up to the first change.

    Only by those that tell every reader: it may come back, as another one, from between here and there.
    """
    found = set[str]()
    for item, verdict in decided:
        body = item.entry.body
        if isinstance(body, Change):
            break
        if body.since is None and not is_over(subscription, item, verdict):
            found.add(body.table)
    return found


def is_over(subscription: Subscription, item: Prepared, verdict: Verdict) -> bool:
    """Whether a reader is shown nothing of an entry."""
    body, number = item.entry.body, item.entry.number
    if not touches(item.entry, subscription.tables):
        return True
    if isinstance(body, Change):
        return verdict.old is verdict.new is False or number <= subscription.covered.get(body.relation.name, 0)
    return not subscription.concerns(body) or _is_covered(subscription, body.table, number)


def _is_covered(subscription: Subscription, table: str, number: int) -> bool:
    tables = subscription.tables if table == "*" else (table,)
    return all(number <= subscription.covered.get(name, 0) for name in tables)
