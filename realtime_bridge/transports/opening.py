"""How a connection of the bridge's own protocol begins, whatever carries it.

Layer: edges. May import: hub, transports.requests, wire.
"""

from realtime_bridge.claims import Claims
from realtime_bridge.hub.base import Sink
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.hub import Hub, Start
from realtime_bridge.transports.requests import Interest
from realtime_bridge.wire import native


def begin(hub: Hub, sink: Sink, claims: Claims, interest: Interest, start: Start) -> Connection:
    """Open the connection, say `ready`, tell which tables are refused, and subscribe to what the address asked for.

    Raises:
        BadRequestError: the filter never could hold.
        TooManyRequestsError: the process or the user has too many connections.
        UnavailableError: the process is being stopped.
    """
    refusals = {table: hub.refusal(table, claims) for table in interest.tables}
    tables = [table for table, refusal in refusals.items() if refusal is None]
    if interest.filter is not None and tables:
        hub.check_filter(interest.filter, tables[0], claims)
    connection = hub.open(sink, claims)
    position = hub.position_at(start)
    connection.send(
        native.ready(
            connection_id=connection.id,
            position=position,
            complete_until=hub.complete_until,
            tables=tables,
            expires_at=claims.expires_at,
            ping_seconds=hub.ping_seconds,
        ),
        position,
    )
    for refusal in refusals.values():
        if refusal is not None:
            connection.send(native.error(4403, refusal))
    if tables:
        hub.subscribe(connection, tables, start, filter_=interest.filter, events=interest.events)
    return connection
