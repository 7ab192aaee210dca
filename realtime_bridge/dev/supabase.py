"""A stand-in for a Supabase project on this machine: Realtime, and as much of Auth and PostgREST as the bridge asks.

Changes are real: read from a database through a temporary logical slot that is polled, as Supabase polls its own. What
nobody hears is gone, as there. What it leaves out: row-level security (so that only the service key may subscribe),
filters and `select` of bindings, broadcast and presence beyond their replies, limits, and the artificial sleeps before
refusals. A domain is shown as its base type.

Layer: whole. May import everything.
Sources: supabase/realtime (UserSocket, RealtimeChannel, the poller of Extensions.PostgresCdcRls), supabase/walrus
(apply_rls), PostgREST's reference of tables and views.
"""

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import count
from types import TracebackType
from typing import Any, Final, Self, TypeAlias
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import asyncpg
import jwt
import orjson
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from realtime_bridge.change import ABSENT, Change, Column, Image, Relation
from realtime_bridge.errors import BadRequestError, BridgeError, NotFoundError, UnauthorizedError
from realtime_bridge.pgoutput import Begin, Delete, Insert, RelationMessage, Update, decode, filled
from realtime_bridge.wire import phoenix
from realtime_bridge.wire.native import microtimestamp
from realtime_bridge.wire.phoenix import Frame, Payload, Vsn

PUBLICATION: Final = "supabase_realtime"
POLL_SECONDS: Final = 0.05
LARGEST_FRAME: Final = 5_000_000
LARGEST_CHANGE: Final = 1_048_576
TOO_LARGE: Final = "Error 413: Payload Too Large"
NO_KEY: Final = "Error 400: Bad Request, no primary key"

_SESSION: Final = {"TimeZone": "UTC", "DateStyle": "ISO", "IntervalStyle": "postgres", "bytea_output": "hex"}


class LocalSupabase:
    """A project at `url`, on a port that the system picks.

    Args:
        dsn: the database, as a superuser.
        jwt_secret: HS256 secret of users' tokens.
        service_key: the key that may subscribe and read; opaque.
        anon_key: a key that may connect, and no more.
        tables: `schema.table` each; the publication `supabase_realtime` is made for them if there is none.
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
    ) -> None:
        self._dsn = dsn
        self._jwt_secret = jwt_secret
        self._service_key = service_key
        self._anon_key = anon_key
        self._tables = tables
        self._sockets: dict[ServerConnection, _Socket] = {}
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._pool = await stack.enter_async_context(_pool(self._dsn))
            await _publish(self._pool, self._tables)
            slot = await stack.enter_async_context(_slot(self._dsn))
            server = await stack.enter_async_context(
                serve(self._serve, "127.0.0.1", 0, process_request=self._answer, max_size=LARGEST_FRAME)
            )
            self.url = f"http://127.0.0.1:{_port(server)}"
            await self._tasks.__aenter__()
            self._poller = self._tasks.create_task(self._poll(slot), name="poll")
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

    async def drop_connections(self, code: int = 1012) -> None:
        """Close every Realtime connection and wait for it; clients take 1012 for a restart of the server."""
        await asyncio.gather(*(connection.close(code) for connection in self._sockets))

    async def resubscribe(self) -> None:
        """Say "Subscribed to PostgreSQL" again to everyone, as after a change of the publication."""
        for socket in self._sockets.values():
            for channel in socket.channels.values():
                if channel.is_live:
                    socket.send(phoenix.system(channel.topic, channel.join_ref, phoenix.SUBSCRIBED))

    async def _poll(self, slot: "_Slot") -> None:
        while True:
            async for relation, operation, data in slot.changes():
                for socket in self._sockets.values():
                    socket.fan_out(relation, operation, data)
            await asyncio.sleep(POLL_SECONDS)

    async def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None, "the handshake is over"
        query = parse_qs(urlsplit(connection.request.path).query)
        socket = _Socket(connection, self, phoenix.parse_vsn(query.get("vsn", [None])[0]), query["apikey"][0])
        self._sockets[connection] = socket
        try:
            with suppress(ConnectionClosed):
                async for data in connection:
                    await socket.receive(data)
        finally:
            del self._sockets[connection]

    # -- HTTP ----------------------------------------------------------------------------------------------------

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a plain request; None lets a Realtime handshake go on."""
        address = urlsplit(request.path)
        try:
            match address.path.strip("/").split("/"):
                case ["realtime", "v1", "websocket"]:
                    query = parse_qs(address.query)
                    phoenix.parse_vsn(query.get("vsn", [None])[0])
                    self._require_key(query.get("apikey", [""])[0])
                    return None
                case ["auth", "v1", "user"]:
                    return _response(200, self._user(request.headers))
                case ["auth", "v1", ".well-known", "jwks.json"]:
                    return _response(200, {"keys": []})
                case ["rest", "v1", table]:
                    self._require_service(request.headers)
                    schema = request.headers.get("Accept-Profile", "public")
                    return _response(200, await _select(self._pool, schema, unquote(table), address.query))
            raise NotFoundError("no such route")
        except BridgeError as error:
            return _response(error.status_code, {"error": str(error), "message": str(error), "code": "", "hint": None})

    def is_service_key(self, key: str) -> bool:
        """Whether this key may see everything."""
        return hmac.compare_digest(key.encode(), self._service_key.encode())

    async def is_published(self, schema: str, table: str) -> bool:
        """Whether the publication has a table of such a name; both are patterns as in LIKE, and `*` is any."""
        names = await self._pool.fetch(
            "select schemaname, tablename from pg_publication_tables where pubname = $1", PUBLICATION
        )
        return any(_matches(schema, name) and _matches(table, other) for name, other in names)

    def _require_key(self, key: str) -> None:
        if not self.is_service_key(key) and not hmac.compare_digest(key.encode(), self._anon_key.encode()):
            self._claims(key)

    def _require_service(self, headers: Headers) -> None:
        if not self.is_service_key(_bearer(headers) or headers.get("apikey", "")):
            raise UnauthorizedError("only the service key may read here")

    def _claims(self, token: str) -> dict[str, Any]:
        options: Any = {"require": ["exp", "role"], "verify_aud": False}
        try:
            return dict(jwt.decode(token, self._jwt_secret, algorithms=["HS256"], options=options))
        except jwt.PyJWTError as error:
            raise UnauthorizedError(str(error)) from None

    def _user(self, headers: Headers) -> Payload:
        claims = self._claims(_bearer(headers))
        if not claims.get("sub"):
            raise UnauthorizedError("missing sub claim")
        named = {name: claims.get(name) for name in ("aud", "role", "email", "phone")}
        metadata = {name: claims.get(name, {}) for name in ("app_metadata", "user_metadata")}
        return {"id": claims["sub"], **named, **metadata, "created_at": "2026-01-01T00:00:00Z", "identities": []}


def _port(server: Server) -> int:
    port = next(iter(server.sockets)).getsockname()[1]
    assert isinstance(port, int), "an Internet socket"
    return port


def _bearer(headers: Headers) -> str:
    return headers.get("Authorization", "").removeprefix("Bearer ")


def _response(status: int, body: Payload | bytes) -> Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    headers = Headers(
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
        }
    )
    return Response(status, HTTPStatus(status).phrase, headers, content)


# -- Realtime --------------------------------------------------------------------------------------------------------


@dataclass
class _Channel:
    """A joined topic. `bindings` are what the client asked for, by id."""

    topic: str
    join_ref: str | None
    token: str
    bindings: dict[int, Payload] = field(default_factory=dict)
    is_live: bool = False

    def ids(self, relation: Relation, operation: str) -> list[int]:
        """The bindings that a change is for."""
        return [
            id_
            for id_, binding in self.bindings.items()
            if binding.get("event", "*").upper() in ("*", operation)
            and _matches(binding.get("schema") or "public", relation.schema)
            and _matches(binding.get("table") or "*", relation.table)
        ]


def _matches(pattern: str, name: str) -> bool:
    """Supabase compares names by LIKE, and takes `*` for any."""
    wildcards = {"_": ".", "%": ".*"}
    expression = "".join(wildcards.get(letter, re.escape(letter)) for letter in pattern)
    return pattern == "*" or re.fullmatch(expression, name) is not None


class _Socket:
    """One Realtime connection and its channels."""

    _ids = count(1)

    def __init__(self, connection: ServerConnection, project: LocalSupabase, vsn: Vsn, key: str) -> None:
        self.channels: dict[str, _Channel] = {}
        self._connection = connection
        self._project = project
        self._vsn = vsn
        self._key = key

    def send(self, frame: Frame) -> None:
        """Send without waiting: a slow client must not hold up the others."""
        broadcast([self._connection], phoenix.encode(self._vsn, frame).decode())

    def fan_out(self, relation: Relation, operation: str, data: bytes) -> None:
        """Send a change to every channel that asked for it."""
        for channel in self.channels.values():
            if channel.is_live and (ids := channel.ids(relation, operation)):
                self.send(phoenix.postgres_changes(channel.topic, ids, data))

    async def receive(self, data: str | bytes) -> None:
        """Act on a frame; one that cannot be read is ignored, as is one for an earlier join."""
        try:
            frame = phoenix.decode(self._vsn, data)
        except BadRequestError:
            return
        channel = self.channels.get(frame.topic)
        if frame.event == "phx_join":
            await self._join(frame)
        elif frame.topic == phoenix.PHOENIX or frame.event == "phx_leave":
            self.send(phoenix.reply(frame))
            self._leave(channel)
        elif channel is None:
            self.send(phoenix.refusal(frame, "unmatched topic"))
        elif frame.join_ref in (None, channel.join_ref):
            await self._act(channel, frame)

    async def _act(self, channel: _Channel, frame: Frame) -> None:
        token = frame.payload.get("access_token")
        if frame.event in ("presence", "broadcast"):
            self.send(phoenix.reply(frame))
        elif frame.event == "access_token" and isinstance(token, str) and token != channel.token:
            channel.token = token
            if not await self._subscribe(channel):
                self._leave(channel)

    def _leave(self, channel: _Channel | None) -> None:
        if channel is not None:
            self.send(phoenix.phx_close(channel.topic, channel.join_ref))
            del self.channels[channel.topic]

    async def _join(self, frame: Frame) -> None:
        if not frame.topic.removeprefix(phoenix.PREFIX) or not frame.topic.startswith(phoenix.PREFIX):
            self.send(phoenix.refusal(frame, "unmatched topic"))
            return
        token = frame.payload.get("access_token") or self._key
        bindings = {next(self._ids): binding for binding in phoenix.bindings(frame)}
        channel = _Channel(frame.topic, frame.ref, token, bindings)
        before, self.channels[frame.topic] = self.channels.get(frame.topic), channel
        self.send(phoenix.join_reply(frame, list(bindings)))
        if before is not None:  # said of the earlier join; the Python client takes it for the new one
            self.send(phoenix.phx_close(before.topic, before.join_ref))
        await self._subscribe(channel)

    async def _subscribe(self, channel: _Channel) -> bool:
        """Make a channel live, and say so, or why not."""
        if not channel.bindings:
            return True
        problem = await self._problem(channel)
        channel.is_live = problem is None
        message, status = (phoenix.SUBSCRIBED, "ok") if problem is None else (problem, "error")
        self.send(phoenix.system(channel.topic, channel.join_ref, message, status="ok" if status == "ok" else "error"))
        return channel.is_live

    async def _problem(self, channel: _Channel) -> str | None:
        if not self._project.is_service_key(channel.token):
            return "This stand-in knows no row-level security: only the service key may subscribe"
        for binding in channel.bindings.values():
            if binding.get("filter") or binding.get("select"):
                return "This stand-in knows neither `filter` nor `select`"
            schema, table = binding.get("schema") or "public", binding.get("table") or "*"
            if not await self._project.is_published(schema, table):
                return (
                    "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the "
                    f"given connect parameters: [event: {binding.get('event')}, schema: {schema}, table: {table}, "
                    "filters: [], select: nil]"
                )
        return None


# -- the database ----------------------------------------------------------------------------------------------------

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


@asynccontextmanager
async def _pool(dsn: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=4, server_settings=_SESSION) as pool:
        yield pool


async def _publish(pool: Pool, tables: Sequence[str]) -> None:
    if not await pool.fetchval("select exists (select from pg_publication where pubname = $1)", PUBLICATION):
        names = ", ".join(".".join(map(_quote, name.split(".", 1))) for name in tables)
        await pool.execute(f"create publication {PUBLICATION} for table {names}")


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@asynccontextmanager
async def _slot(dsn: str) -> AsyncIterator["_Slot"]:
    """A temporary slot on a session of its own, with which it ends."""
    connection = await asyncpg.connect(dsn, server_settings=_SESSION)
    try:
        name = f"supabase_realtime_{connection.get_server_pid()}"
        await connection.execute("select pg_create_logical_replication_slot($1, 'pgoutput', true)", name)
        yield _Slot(connection, name)
    finally:
        await connection.close()


_GET: Final = """
select data from pg_logical_slot_get_binary_changes(
  $1, null, null, 'proto_version', '1', 'publication_names', $2)
"""
_DESCRIBE: Final = """
select a.attname as name, coalesce(b.typname, t.typname) as type, c.relrowsecurity as is_secured,
       coalesce(a.attnum = any (i.indkey), false) as is_key
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_type t on t.oid = a.atttypid
left join pg_type b on b.oid = t.typbasetype
left join pg_index i on i.indrelid = c.oid and i.indisprimary
where c.oid = $1
order by a.attnum
"""


@dataclass(frozen=True)
class _Table:
    """A relation, which of its columns old rows bring, and whether row-level security is on."""

    relation: Relation
    identity: frozenset[str]
    is_secured: bool

    def old_image(self, old: Image, *, is_whole: bool) -> Image:
        """An old row sent as a key has NULL in place of all else."""
        columns = zip(self.relation.columns, old, strict=True)
        return tuple(value if is_whole or column.name in self.identity else ABSENT for column, value in columns)


class _Slot:
    """What was committed since the last poll. Reading it is forgetting it."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", name: str) -> None:
        self._connection = connection
        self._name = name

    async def changes(self) -> AsyncIterator[tuple[Relation, str, bytes]]:
        """Relation, operation and the `data` of a `postgres_changes` payload, in commit order."""
        tables: dict[int, _Table] = {}
        commit_time = 0
        for (data,) in await self._connection.fetch(_GET, self._name, PUBLICATION):
            match decode(data):
                case Begin() as begin:
                    commit_time = begin.commit_time
                case RelationMessage() as described:
                    tables[described.id] = await self._describe(described)
                case Insert() | Update() | Delete() as message:
                    table = tables[message.relation_id]
                    change = _change(table, message, commit_time)
                    yield table.relation, change.operation, _data(table, change)

    async def _describe(self, message: RelationMessage) -> _Table:
        described = {row["name"]: row for row in await self._connection.fetch(_DESCRIBE, message.id)}
        columns = tuple(Column(column.name, described[column.name]["type"]) for column in message.columns)
        key = tuple(i for i, column in enumerate(columns) if described[column.name]["is_key"])
        relation = Relation(message.schema, message.table, columns, key, full=message.identity == "f")
        identity = frozenset(column.name for column in message.columns if column.identity)
        return _Table(relation, identity, any(row["is_secured"] for row in described.values()))


def _change(table: _Table, message: Insert | Update | Delete, commit_time: int) -> Change:
    match message:
        case Insert(_, new):
            return Change("INSERT", table.relation, None, new, commit_time)
        case Update(_, None, _, new):
            return Change("UPDATE", table.relation, None, new, commit_time)
        case Update(_, old, whole, new):
            assert old is not None, "else the case above"
            image = table.old_image(old, is_whole=whole)
            return Change("UPDATE", table.relation, image, filled(new, old) if whole else new, commit_time)
        case Delete(_, old, whole):
            return Change("DELETE", table.relation, table.old_image(old, is_whole=whole), None, commit_time)


def _data(table: _Table, change: Change) -> bytes:
    relation = change.relation
    if not relation.key and change.operation != "DELETE":
        return _refused(change)
    key = [relation.columns[i].name for i in relation.key]
    hidden = change.operation == "DELETE" and table.is_secured
    data = phoenix.change_data(change, microtimestamp(change.commit_time), old=key if hidden else None)
    return data if len(data) <= LARGEST_CHANGE else _cut(data)


def _cut(data: bytes) -> bytes:
    """What Supabase leaves of a change that is too large: values of at most 64 bytes, and no NULL."""
    fields = orjson.loads(data)
    for name in ("record", "old_record"):
        if name in fields:
            row = fields[name].items()
            fields[name] = {k: v for k, v in row if v is not None and len(orjson.dumps(v)) <= 64}
    return orjson.dumps({**fields, "errors": [TOO_LARGE]})


def _refused(change: Change) -> bytes:
    """What Supabase sends in place of a row of a table without primary key."""
    rows: dict[str, Payload] = {"record": {}} if change.operation == "INSERT" else {"record": {}, "old_record": {}}
    relation = change.relation
    return orjson.dumps(
        {
            "schema": relation.schema,
            "table": relation.table,
            "type": change.operation,
            "commit_timestamp": None,
            "errors": [NO_KEY],
            "columns": [],
            **rows,
        }
    )


# -- PostgREST: GET of a table ---------------------------------------------------------------------------------------

_OPERATORS: Final = {"eq": "=", "gt": ">", "gte": ">=", "in": "= any"}
_COLUMNS: Final = """
select attname, format_type(atttypid, atttypmod) from pg_attribute
where attrelid = to_regclass($1) and attnum > 0 and not attisdropped
"""


async def _select(pool: Pool, schema: str, table: str, query: str) -> bytes:
    """Rows as a JSON array: `select=*`, filters `eq gt gte in`, `order`, `limit`.

    Raises:
        NotFoundError: no such table.
        BadRequestError: anything else in the query, or a value that does not fit its column.
    """
    name = f"{_quote(schema)}.{_quote(table)}"
    types: dict[str, str] = {row[0]: row[1] for row in await pool.fetch(_COLUMNS, name)}
    if not types:
        raise NotFoundError(f"no table {schema}.{table}")
    conditions: list[str] = []
    arguments: list[str | list[str]] = []
    order = limit = ""
    for word, value in parse_qsl(query, keep_blank_values=True):
        if word == "order":
            order = "order by " + ", ".join(_order(types, term) for term in value.split(","))
        elif word == "limit" and value.isdigit():
            limit = f"limit {int(value)}"
        elif word in types:
            condition, argument = _condition(word, types[word], value, len(arguments) + 1)
            conditions.append(condition)
            arguments.append(argument)
        elif (word, value) != ("select", "*"):
            raise BadRequestError(f"{word}: not understood here")
    where = f"where {' and '.join(conditions)}" if conditions else ""
    rows = f"select * from {name} {where} {order} {limit}"  # noqa: S608 - every name in it is quoted
    sql = f"select coalesce(json_agg(to_jsonb(r)), '[]')::text from ({rows}) r"  # noqa: S608 - likewise
    try:
        text: str = await pool.fetchval(sql, *arguments)
    except asyncpg.DataError as error:
        raise BadRequestError(str(error)) from None
    return text.encode()


def _condition(column: str, type_: str, value: str, number: int) -> tuple[str, str | list[str]]:
    word, _, operand = value.partition(".")
    operator = _OPERATORS.get(word)
    if operator is None:
        raise BadRequestError(f"{column}: operator {word} is not understood here")
    if word != "in":
        return f"{_quote(column)} {operator} ${number}::text::{type_}", operand
    if not (operand.startswith("(") and operand.endswith(")")):
        raise BadRequestError(f"{column}: in.(…)")
    return f"{_quote(column)} = any (${number}::text[]::{type_}[])", _items(operand[1:-1])


def _items(text: str) -> list[str]:
    """The items of an `in` list; one in double quotes may hold commas."""
    return [
        re.sub(r"\\(.)", r"\1", quoted) if quoted or not bare else bare
        for quoted, bare in re.findall(r'"((?:[^"\\]|\\.)*)"|([^,"]+)', text)
    ]


def _order(types: dict[str, str], term: str) -> str:
    column, _, direction = term.partition(".")
    if column not in types or direction not in ("", "asc", "desc"):
        raise BadRequestError(f"order: {term}")
    return f"{_quote(column)} {direction}"
