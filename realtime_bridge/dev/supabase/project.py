"""The stand-in as a whole: Realtime, and as much of Auth and PostgREST as the bridge asks.

Changes are real: read from a database through a temporary logical slot that is polled, as Supabase polls its own. What
nobody hears is gone, as there. What it leaves out: row-level security (so that only the service key may subscribe),
filters and `select` of bindings, broadcast and presence beyond their replies, limits, and the artificial sleeps before
refusals. A domain is shown as its base type.

Layer: whole (dev). May import everything.
Sources: supabase/realtime, supabase/auth, PostgREST.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from http import HTTPStatus
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

import orjson
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from realtime_bridge.dev.supabase.changes import open_pool, open_slot, publish, published
from realtime_bridge.dev.supabase.channels import Rules
from realtime_bridge.dev.supabase.keys import Keys
from realtime_bridge.dev.supabase.posts import serve_posts
from realtime_bridge.dev.supabase.realtime import Realtime
from realtime_bridge.dev.supabase.rest import select, upsert
from realtime_bridge.dev.supabase.road import Road
from realtime_bridge.errors import BridgeError, NotFoundError
from realtime_bridge.wire import phoenix
from realtime_bridge.wire.phoenix import Payload

LARGEST_FRAME: Final = 5_000_000


class LocalSupabase:
    """A project at `url`, on a port that the system picks.

    Everything from `close` on lets it misbehave; all of it can be mixed, and what lasts says how it is ended.

    Args:
        dsn: the database, as a superuser.
        jwt_secret: HS256 secret of users' tokens.
        service_key: the key that may subscribe and read; opaque.
        anon_key: a key that may connect, and no more.
        tables: `schema.table` each; the publication `supabase_realtime` is made for them if there is none.
        jwks: public keys to publish, each as a JWK.
    """

    url: str

    def __init__(
        self,
        dsn: str,
        *,
        jwt_secret: str,
        service_key: str,
        anon_key: str,
        tables: Sequence[str] = ("public.posts",),
        jwks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._dsn = dsn
        self._tables = tables
        self._keys = Keys(jwt_secret, service_key, anon_key, jwks)
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._pool = await stack.enter_async_context(open_pool(self._dsn))
            await publish(self._pool, self._tables)
            slot = await stack.enter_async_context(open_slot(self._dsn))
            self._rules = Rules(self._keys, partial(published, self._pool))
            self._realtime = Realtime(self._rules)
            server = await stack.enter_async_context(
                serve(self._realtime.serve, "127.0.0.1", 0, process_request=self._answer, max_size=LARGEST_FRAME)
            )
            posts = await stack.enter_async_context(serve_posts(self._answer_post))
            self._road = await stack.enter_async_context(Road(_port(server), posts))
            self.url = f"http://127.0.0.1:{self._road.port}"
            await self._tasks.__aenter__()
            self._poller = self._tasks.create_task(self._realtime.poll(slot), name="poll")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._poller.cancel()
        try:
            # A cancellation may be the group's own, for a poller that failed; other errors pass by it unwrapped.
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                await self._tasks.__aexit__(kind, error, trace)
            else:
                await self._tasks.__aexit__(None, None, None)
        finally:
            await self._stack.aclose()

    def set_jwks(self, keys: Sequence[Mapping[str, Any]]) -> None:
        """Publish other public keys from now on."""
        self._keys.jwks = tuple(keys)

    # -- misbehaving: the way --------------------------------------------------------------------------------------

    async def close(self, code: int = 1012) -> None:
        """Close every Realtime connection and wait for it; clients take 1012 for a restart of the server."""
        await self._realtime.close(code)

    def freeze(self) -> None:
        """Let nothing move, in either direction, until `thaw`: connections stay open, new ones get no answer."""
        self._road.freeze()

    def thaw(self) -> None:
        """Let everything move again, beginning with what was held back."""
        self._road.thaw()

    async def restart(self, seconds: float = 1.0) -> None:
        """Cut every connection, listen to nobody for so long, then at the same address again."""
        await self._road.restart(seconds)

    # -- misbehaving: changes ----------------------------------------------------------------------------------------

    def drop(self, changes: int) -> None:
        """Keep the next so many changes from everyone, without a word; 0 ends it."""
        self._realtime.drop(changes)

    def deafen(self) -> None:
        """Tell whoever is connected now of no change any more, without a word; heartbeats are answered, as ever."""
        self._realtime.deafen()

    def delay(self, seconds: float) -> None:
        """Let the poller stand still for so long: what is committed meanwhile comes late, and nothing is lost."""
        self._realtime.delay(seconds)

    def repeat(self, changes: int) -> None:
        """Send the next so many changes twice, those of one poll one after another: A B C A B C."""
        self._realtime.repeat(changes)

    def oversize(self) -> None:
        """Send the next change in a frame of more than 1 MiB, which the Python client answers by closing with 1009."""
        self._realtime.oversize()

    # -- misbehaving: channels -------------------------------------------------------------------------------------

    def phx_close(self) -> None:
        """End every channel; the connections stay open."""
        self._realtime.phx_close()

    def system_error(self, message: str = "Too many database timeouts") -> None:
        """Tell every channel of a problem; it stays joined."""
        self._realtime.say(message, is_error=True)

    def resubscribe(self) -> None:
        """Say "Subscribed to PostgreSQL" again to everyone, as after a change of the publication."""
        self._realtime.say(phoenix.SUBSCRIBED)

    def refuse_joins(self, reason: str | None = "RealtimeRestarting: Realtime is restarting, please standby") -> None:
        """Refuse every join; None ends it."""
        self._rules.refusal = reason

    def ignore_joins(self, *, ignored: bool = True) -> None:
        """Leave every join without an answer; False ends it."""
        self._rules.is_mute = ignored

    # -- HTTP --------------------------------------------------------------------------------------------------------

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a plain request; None lets a Realtime handshake go on."""
        address = urlsplit(request.path)
        try:
            match address.path.strip("/").split("/"):
                case ["realtime", "v1", "websocket"]:
                    query = parse_qs(address.query)
                    phoenix.parse_vsn(query.get("vsn", [None])[0])
                    self._keys.require_any(query.get("apikey", [""])[0])
                    return None
                case ["auth", "v1", "user"]:
                    return _response(200, self._keys.user(request.headers))
                case ["auth", "v1", ".well-known", "jwks.json"]:
                    return _response(200, {"keys": self._keys.jwks})
                case ["rest", "v1", table]:
                    self._keys.require_service(request.headers)
                    schema = request.headers.get("Accept-Profile", "public")
                    counted = "count=exact" in request.headers.get("Prefer", "")
                    found = await select(self._pool, schema, unquote(table), address.query, counted=counted)
                    return _response(200, found.rows, {"Content-Range": found.content_range})
            raise NotFoundError("no such route")
        except BridgeError as error:
            return _refusal(error)

    async def _answer_post(self, path: str, headers: Headers, body: bytes) -> Response:
        address = urlsplit(path)
        try:
            match address.path.strip("/").split("/"):
                case ["rest", "v1", table]:
                    self._keys.require_service(headers)
                    schema = headers.get("Content-Profile", "public")
                    await upsert(self._pool, schema, unquote(table), address.query, body)
                    return _response(201, b"")
            raise NotFoundError("no such route")
        except BridgeError as error:
            return _refusal(error)


def _port(server: Server) -> int:
    port = next(iter(server.sockets)).getsockname()[1]
    assert isinstance(port, int), "an Internet socket"
    return port


def _refusal(error: BridgeError) -> Response:
    told = {"error": str(error), "message": str(error), "code": "", "hint": None}
    return _response(error.status_code, told)


def _response(status: int, body: Payload | bytes, more: Mapping[str, str] = MappingProxyType({})) -> Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    headers = Headers(
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
            **more,
        }
    )
    return Response(status, HTTPStatus(status).phrase, headers, content)
