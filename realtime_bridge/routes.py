"""Every route of the contract, on one router that also works inside somebody else's application.

Layer: whole. May import: everything above.
"""

import base64
import secrets
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.websockets import WebSocket

from realtime_bridge.auth import bearer, require_claims
from realtime_bridge.errors import NotFoundError, UnauthorizedError
from realtime_bridge.metrics import CONTENT_TYPE
from realtime_bridge.rest.origins import guarded_route, preflight
from realtime_bridge.rest.posts import posts_router
from realtime_bridge.rest.problems import problem

if TYPE_CHECKING:
    from realtime_bridge.bridge import Bridge

_MEDIA_TYPES: Final = {".js": "text/javascript", ".ts": "text/plain", ".css": "text/css"}
_FRESH: Final = {"Cache-Control": "no-cache"}
"""Ask each time: after an upgrade the page and the client are those of the new version."""
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_router(bridge: "Bridge") -> APIRouter:
    """The router of one bridge. Every answer that is an error is `application/problem+json`."""
    route_class = guarded_route(bridge.allows)
    router = APIRouter(route_class=route_class)
    preflights = ["/events", "/ticket"]

    @router.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        await bridge.running.websocket(websocket)

    @router.get("/events")
    async def events(request: Request) -> Response:
        return await bridge.running.events(request)

    @router.post("/ticket", dependencies=[Depends(HTTPBearer(auto_error=False))])
    async def ticket(request: Request) -> Response:
        token = bearer(request.headers.get("authorization"))
        if token is None:
            raise UnauthorizedError("missing")
        ticket, expires_in = await bridge.running.tickets.issue(token)
        return JSONResponse({"ticket": ticket, "expires_in": expires_in}, headers={"Cache-Control": "no-store"})

    @router.get("/healthz")
    @router.head("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz")
    @router.head("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        checks = await bridge.checks()
        ok = all(check.ok for check in checks.values())
        body: dict[str, Any] = {
            "status": "ready" if ok else "not ready",
            "complete_until": bridge.running.hub.complete_until,
            "guarantee": asdict(bridge.running.guarantor.guarantee),
            "checks": {name: {"ok": check.ok, "reason": check.reason} for name, check in checks.items()},
        }
        return JSONResponse(body, status_code=200 if ok else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(bridge.metrics.page(), media_type=CONTENT_TYPE)

    _add_pages(router, bridge)
    if bridge.settings.database_url is not None:
        caller = require_claims(bridge.verifier)
        router.include_router(
            posts_router(
                lambda: bridge.database, caller, lambda claims: bridge.running.hub.position_for(claims), route_class
            )
        )
        preflights += ["/posts", "/posts/{id}"]
    for path in preflights:
        router.add_api_route(path, preflight, methods=["OPTIONS"], include_in_schema=False)
    return router


def _add_pages(router: APIRouter, bridge: "Bridge") -> None:
    @router.get("/")
    async def page(request: Request) -> Response:
        if not _is_admin(bridge, request):
            return problem(401, "the admin token is needed", {"WWW-Authenticate": 'Basic realm="realtime_bridge"'})
        return live_page()

    @router.get("/client.js")
    @router.get("/client.d.ts", include_in_schema=False)
    @router.get("/page.js", include_in_schema=False)
    @router.get("/page.css", include_in_schema=False)
    async def static(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return Response(_static(name), media_type=_MEDIA_TYPES[Path(name).suffix], headers=_FRESH)


def live_page(users: str | None = None) -> Response:
    """The live page.

    Args:
        users: where it finds users with their tokens; without that it asks for tokens.
    """
    content = _static("index.html")
    if users is not None:
        content = content.replace(b"<body>", f'<body data-users="{users}">'.encode())
    return Response(content, media_type="text/html", headers=_FRESH | {"Content-Security-Policy": _PAGE_POLICY})


def _static(name: str) -> bytes:
    return resources.files("realtime_bridge").joinpath("static", name).read_bytes()


def _is_admin(bridge: "Bridge", request: Request) -> bool:
    """Whether the admin token came as password of HTTP Basic, which a browser asks for, or as bearer."""
    wanted = bridge.settings.admin_token
    if wanted is None:
        raise NotFoundError("the page is off: set BRIDGE_ADMIN_TOKEN to have it")
    scheme, value = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() == "basic":
        value = _password(value)
    return secrets.compare_digest(value.encode(), wanted.get_secret_value().encode())


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""
