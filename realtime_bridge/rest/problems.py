"""Errors of the HTTP routes as `application/problem+json`, and a bound on what a request may bring.

A router inside somebody else's application cannot rely on its handlers, so its routes are `ProblemRoute`s, which answer
for themselves. Where there is no route, an application that is ours answers by `rest.application`.

Layer: edges. May import: errors.
Sources: RFC 9457 (problem details; `about:blank` says that the title is the status's own), RFC 6750 section 3.
"""

from collections.abc import Callable, Coroutine, Mapping
from http.client import responses
from typing import Any, Final

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from realtime_bridge.errors import BridgeError

LARGEST_BODY: Final = 2 * 1024 * 1024
"""Bytes of a request's body: room for 100,000 characters, each written as a JSON escape."""

_RETRY_SECONDS: Final = "5"
_HEADERS: Final[Mapping[int, Mapping[str, str]]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": _RETRY_SECONDS},
    503: {"Retry-After": _RETRY_SECONDS},
}
_MOST_COMPLAINTS: Final = 5
_LONGEST_NAME: Final = 40
"""Characters of a field's name that are repeated: an unknown field's is whatever was sent."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A problem response, with the headers that its status asks for."""
    told = detail.encode(errors="replace").decode()  # a lone surrogate, from a client's JSON perhaps, has no UTF-8
    body = {"type": "about:blank", "title": responses.get(status, "Error"), "status": status, "detail": told}
    return Response(
        orjson.dumps(body),
        status,
        {**_HEADERS.get(status, {}), **(headers or {})},
        media_type="application/problem+json",
    )


def problem_of(error: Exception) -> Response:
    """The response for an error that a route may end with.

    Args:
        error: a `BridgeError`, FastAPI's validation error, or an HTTP exception; anything else is a plain 500.
    """
    match error:
        case BridgeError():
            return problem(error.status_code, error.detail)
        case RequestValidationError():
            return problem(422, _complaints(error))
        case HTTPException():
            return problem(error.status_code, str(error.detail), error.headers)
        case _:
            return problem(500, "the bridge failed to answer")


class ProblemRoute(APIRoute):
    """A route that answers its own errors, wherever its router is included, and refuses too large bodies."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(Request(request.scope, _bounded(request.receive)))
            except (BridgeError, RequestValidationError, HTTPException) as error:
                return problem_of(error)

        return answer


def _bounded(receive: Receive) -> Receive:
    """Receive a body, up to the limit; beyond it, raise the one kind of error that FastAPI lets pass while it reads."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            raise HTTPException(413, f"the body is larger than {LARGEST_BODY} bytes")
        return message

    return bounded


def _complaints(error: RequestValidationError) -> str:
    """What is wrong where, without the values that were sent."""
    found = error.errors()
    told = [
        f"{'.'.join(str(part)[:_LONGEST_NAME] for part in one['loc'])}: {one['msg']}"
        for one in found[:_MOST_COMPLAINTS]
    ]
    return "; ".join(told) + (f"; and {len(found) - len(told)} more" if len(found) > len(told) else "")
