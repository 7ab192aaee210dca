"""What `/ws` and `/events` have in common: who is asking, which tables, from where; which origins may ask.

Layer: edges. May import: words, filters, auth, tickets.
Sources: RFC 9110 sections 12.4.2 and 12.5.1 (weights, Accept).
"""

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Self

from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from realtime_bridge.auth import bearer
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BadRequestError
from realtime_bridge.filters import Filter, parse_filter
from realtime_bridge.tickets import Tickets, client_of

_NEVER: Final = re.compile(r"q=0(\.0*)?")
OPERATIONS: Final = ("INSERT", "UPDATE", "DELETE")


def bearer_subprotocol(request: HTTPConnection) -> tuple[str, str] | tuple[None, None]:
    """The pair `bearer, <token>` that a WebSocket offers as subprotocols: what to answer with, and the token."""
    offered = [part.strip() for part in request.headers.get("sec-websocket-protocol", "").split(",")]
    return (offered[0], offered[1]) if len(offered) >= 2 and offered[0].lower() == "bearer" else (None, None)


def accepts_events(request: HTTPConnection) -> bool:
    """Whether a request names Server-Sent Events among what it accepts; `*/*`, which all say, is no wish for them."""
    for accepted in ",".join(request.headers.getlist("accept")).lower().split(","):
        media_type, *parameters = (part.strip() for part in accepted.split(";"))
        if media_type == "text/event-stream":
            return not any(_NEVER.fullmatch(parameter) for parameter in parameters)
    return False


@dataclass(frozen=True)
class Credentials:
    """What a request may show to be let in.

    Attributes:
        verify: as `Verifier.verify`.
        token_in_query: whether `?token=` counts. A ticket is no token, and always does.
    """

    verify: Callable[[str], Awaitable[Claims]]
    tickets: Tickets
    token_in_query: bool

    async def claims_of(self, request: HTTPConnection, *, stream: bool = False) -> Claims | None:
        """The claims of the token or ticket of a request, or None if there is neither.

        Args:
            request: or WebSocket.
            stream: whether the client comes back by itself, with `Last-Event-ID`, as an EventSource does.

        Raises:
            BadRequestError: there are both.
            UnauthorizedError, ForbiddenError, UnavailableError: as `Verifier.verify`.
        """
        token, ticket = self._token(request), request.query_params.get("ticket")
        if not ticket:
            return None if token is None else await self.verify(token)
        if token is not None:
            raise BadRequestError("token and ticket: give one of them")
        client = client_of(request.headers) if stream else None
        return await self.tickets.redeem(ticket, client, resuming="last-event-id" in request.headers)

    def _token(self, request: HTTPConnection) -> str | None:
        """From the header, the subprotocols or the query, in this order."""
        token = bearer(request.headers.get("authorization")) or bearer_subprotocol(request)[1]
        if not token and self.token_in_query:
            token = request.query_params.get("token")
        return token or None


def origin_allowed(origin: str | None, host: str | None, allowed: Collection[str]) -> bool:
    """Whether a page from `origin` may talk to this host: it is of the same one (name and port), or of an allowed one.

    No Origin: no browser, and so allowed.
    """
    if origin is None or "*" in allowed:
        return True
    origin = origin.rstrip("/").lower()
    if host and origin.partition("://")[2] == host.lower():
        return True
    return origin in {one.rstrip("/").lower() for one in allowed}


def parse_table(value: object, served: Collection[str]) -> str:
    """`schema.table`, or `table` for one in `public`.

    Raises:
        BadRequestError: neither, or not one of those served.
    """
    if not isinstance(value, str) or not value or value.count(".") > 1 or len(value) > 130:
        raise BadRequestError("table: a text of the form schema.table")
    table = value if "." in value else f"public.{value}"
    if table not in served:
        raise BadRequestError(f"table: {table} is not served here")
    return table


def parse_events(value: object) -> frozenset[str] | None:
    """`INSERT,UPDATE,DELETE` or some of them, as text or list; None for all.

    Raises:
        BadRequestError: something else.
    """
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
        raise BadRequestError("events: some of INSERT, UPDATE, DELETE")
    events = frozenset(part.strip().upper() for part in parts)
    if not events <= set(OPERATIONS):
        raise BadRequestError("events: some of INSERT, UPDATE, DELETE")
    return None if len(events) == len(OPERATIONS) else events


@dataclass(frozen=True)
class Interest:
    """What the address of a request subscribes to.

    Attributes:
        position: where to begin; None for the present.
    """

    tables: Sequence[str]
    position: str | None = None
    filter: Filter | None = None
    events: frozenset[str] | None = None

    @classmethod
    def parse(cls, query: QueryParams, served: Sequence[str]) -> Self:
        """Read the query parameters. An empty `table=` subscribes to nothing by the address.

        Raises:
            BadRequestError: naming the parameter.
        """
        asked = query.getlist("table")
        tables = list(dict.fromkeys(parse_table(t, served) for t in asked if t)) if asked else list(served)
        filter_text = query.get("filter")
        if filter_text and len(tables) != 1:
            raise BadRequestError("filter: needs exactly one table")
        return cls(
            tables,
            query.get("position") or None,
            parse_filter(filter_text) if filter_text else None,
            parse_events(query.get("events") or None),
        )
