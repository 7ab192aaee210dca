"""What `/ws` and `/events` have in common: where the token is, which tables, from where; which origins may ask.

Layer: edges. May import: words, filters.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from realtime_bridge.errors import BadRequestError
from realtime_bridge.filters import Filter, parse_filter

OPERATIONS: Final = ("INSERT", "UPDATE", "DELETE")
_BEARER: Final = "bearer"


def token_of(request: HTTPConnection, *, in_query: bool) -> tuple[str | None, str | None]:
    """The token of a request, or None, and the WebSocket subprotocol to answer with, or None.

    Looked for in this order: `Authorization: Bearer`, the subprotocol pair `bearer, <token>`, `?token=`.
    """
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == _BEARER and value.strip():
        return value.strip(), None
    offered = [part.strip() for part in request.headers.get("sec-websocket-protocol", "").split(",")]
    if len(offered) >= 2 and offered[0].lower() == _BEARER:
        return offered[1], offered[0]
    return (request.query_params.get("token") or None) if in_query else None, None


def origin_allowed(origin: str | None, host: str | None, allowed: Collection[str]) -> bool:
    """Whether a page from `origin` may talk to this host. No Origin: no browser, and so allowed.

    With nothing in `allowed` only the same host (name and port) is.
    """
    if origin is None or "*" in allowed:
        return True
    if allowed:
        return origin.rstrip("/").lower() in {a.rstrip("/").lower() for a in allowed}
    return host is not None and urlsplit(origin).netloc.lower() == host.lower()


def parse_table(value: object) -> str:
    """`schema.table`, or `table` for one in `public`.

    Raises:
        BadRequestError: neither.
    """
    if not isinstance(value, str) or not value or value.count(".") > 1 or len(value) > 130:
        raise BadRequestError("table: a text of the form schema.table")
    return value if "." in value else f"public.{value}"


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
        tables = list(dict.fromkeys(parse_table(t) for t in asked if t)) if asked else list(served)
        for table in tables:
            if table not in served:
                raise BadRequestError(f"table: {table} is not served here")
        filter_text = query.get("filter")
        if filter_text and len(tables) != 1:
            raise BadRequestError("filter: needs exactly one table")
        return cls(
            tables,
            query.get("position") or None,
            parse_filter(filter_text) if filter_text else None,
            parse_events(query.get("events") or None),
        )
