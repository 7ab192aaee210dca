"""What an application that is ours answers where no route does, or where one has failed: always a problem.

Layer: edges. May import: errors, rest.problems, rest.origins.
Sources: RFC 9110 section 15.5.6 (Allow), ASGI's "WebSocket Denial Response".
"""

from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.websockets import WebSocket

from realtime_bridge.errors import BridgeError
from realtime_bridge.rest.origins import Allowed, guarded
from realtime_bridge.rest.problems import problem, problem_of

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def install(app: FastAPI, allowed: Allowed) -> None:
    """Let an application that has all of its routes answer every error with a problem, those of no route included."""

    async def answer(request: Request, error: Exception) -> Response:
        async def told(request: Request) -> Response:
            response = problem_of(error)
            if response.status_code == 405:
                response.headers["Allow"] = ", ".join(_methods(request))
            return response

        return await guarded(request, told, allowed)

    for kind in (BridgeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    app.add_api_websocket_route("/{path:path}", _refuse)


def _methods(request: Request) -> list[str]:
    """What the path may be asked for by: of all routes that have it, not of the first alone."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _refuse(websocket: WebSocket) -> None:
    """A WebSocket where there is none: there is no protocol by whose close codes to say it, so it is not accepted."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(problem(404, "Not Found"))
    else:
        await websocket.close()
