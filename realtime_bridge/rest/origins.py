"""Which pages may use the HTTP routes, and what their browsers are told of it (CORS).

The routes do it themselves: middleware belongs to an application, and that may be somebody else's. No cookie is ever
looked at, so no page is allowed credentials: a token is what it has to bring.

Layer: edges. May import: errors, rest.problems.
Sources: Fetch Standard, "CORS protocol".
"""

from collections.abc import Callable
from typing import Final, TypeAlias

from fastapi import Request, Response

from realtime_bridge.errors import ForbiddenError
from realtime_bridge.rest.problems import Handler, ProblemRoute, problem_of

Allowed: TypeAlias = Callable[[str | None, str | None], bool]
"""Whether a page of an Origin may ask a Host."""

_EXPOSED: Final = "Realtime-Position, Link, Retry-After"
_PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "7200",
}


def guarded_route(allowed: Allowed) -> type[ProblemRoute]:
    """A class of routes that refuse a page of an origin that is not allowed, and let any other read the answer."""

    class GuardedRoute(ProblemRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def answer(request: Request) -> Response:
                return await guarded(request, handler, allowed)

            return answer

    return GuardedRoute


async def guarded(request: Request, handler: Handler, allowed: Allowed) -> Response:
    """Answer a page of an allowed origin, and let it read the answer; refuse any other."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if not allowed(origin, host):
        response = problem_of(ForbiddenError("origin not allowed"))
    else:
        response = await handler(request)
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    response.headers.add_vary_header("Origin")
    return response


async def preflight() -> Response:
    """The endpoint for OPTIONS, by which a browser asks what a page of another origin may send."""
    return Response(status_code=204, headers=_PREFLIGHT)
