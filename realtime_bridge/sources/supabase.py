"""Changes from Supabase Realtime, through the official client with the service key.

At most once by nature: an event has no number, the slot behind it is temporary, and over the rate limit changes are
dropped in silence. So everything that may have cost a change is a *doubt*, and every doubt becomes one `resync`, put
behind all that was received before it: who reads the table again after it cannot be thrown back by an older change.

The client's own reconnecting is switched off, since it gives up for good after some tries and repeats the join in ways
that real servers answer by closing the channel. A link that is not healthy ends the stream; whoever reads opens it
again, with backoff, and a stream that continues a history begins with a resync.

What cannot be had this way: digits of a `numeric` (or of a number inside json) beyond those of a double, since the
client parses them into one; the base type of a domain; commits that the server's poller silently left out.

Layer: adapters. May import: change, errors, wire.phoenix, sources.base.
Sources: realtime 2.34.1 (`_async/client.py`, `_async/channel.py`); https://supabase.com/docs/guides/realtime/protocol.
"""

import asyncio
import json
import logging
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final, TypeAlias

from realtime import (
    AsyncRealtimeChannel,
    AsyncRealtimeClient,
    ChannelEvents,
    Message,
    RealtimePostgresChangesListenEvent,
    RealtimeSubscribeStates,
)
from realtime.message import ReplyMessage, ServerMessage, SuccessSystemPayload
from realtime.types import PostgresChangesPayload
from supabase import AsyncClientOptions, AsyncSupabaseException, acreate_client
from websockets.exceptions import InvalidStatus, WebSocketException

from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Image, Relation
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.wire.phoenix import SUBSCRIBED

logger = logging.getLogger(__name__)

Keys: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""Asks for the names of the primary key's columns of `schema.table`; empty if it has none. A `BridgeError` that it
raises ends the stream."""

OPEN_SECONDS: Final = 30.0
"""A cold server takes up to 8 s to subscribe, and delays refusals by 2 to 5 s on purpose."""
CLOSE_SECONDS: Final = 2.0
BATCH_SECONDS: Final = 0.5
HEARTBEAT_SECONDS: Final = 4.0
SILENCE_SECONDS: Final = 8.0
"""A heartbeat unanswered for so long means a link that is dead, whatever it says of itself."""
POLL_SECONDS: Final = 2.0
"""How far the server's poller may trail a commit: it polls every 0.1 to 0.5 s."""
MOST_WAITING: Final = 4_000
"""Changes received but not yet taken; what comes beyond is a doubt. The client bounds each to 1 MiB."""
REPEAT_SECONDS: Final = 60.0
REPEAT_KEYS: Final = 10_000

_PHOENIX: Final = "phoenix"
_TOPIC: Final = "realtime-bridge"
_ALL: Final = "*"


class SupabaseSource:
    """The tables' changes as Supabase Realtime tells them.

    Args:
        url: the project's address.
        key: its service key; the client is never signed in, and the key is never logged.
        tables: `schema.table` each.
        keys: asks Postgres for primary keys. Without it they are learned from the first old row that brings only some
            of the columns; until then the column `id` is taken for the key, if there is one.
    """

    name = "supabase"

    def __init__(self, url: str, key: str, *, tables: Sequence[str], keys: Keys | None = None) -> None:
        self._url = url
        self._key = key
        self._tables = tuple(tables)
        self._reader = PayloadReader(keys)
        self._mark = f"supabase|{url.partition('://')[2].partition('/')[0]}|"

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator["SupabaseStream"]:
        """Subscribe, and return once changes flow; see `Source.open`.

        `owner` has no use here: upstream, nothing is held that a successor would have to take away.
        """
        async with _linked(self._url, self._key, self._tables) as link:
            logger.info("supabase source live", extra={"tables": ",".join(self._tables)})
            yield SupabaseStream(link, self._reader, self._mark, is_gap=after is not None)

    async def check(self) -> None:
        """Subscribe and leave again; see `Source.check`."""
        async with _linked(self._url, self._key, self._tables):
            pass


class SupabaseStream:
    """An open subscription; see `SourceStream`.

    `proven_until` is when the newest heartbeat that was answered was sent, less `POLL_SECONDS`: it proves the link and
    all that the server had sent by then, not the server's own poller behind it.
    """

    def __init__(self, link: "_Link", reader: "PayloadReader", mark: str, *, is_gap: bool) -> None:
        self._link = link
        self._reader = reader
        self._mark = mark
        self._watermark = mark
        self._is_gap = is_gap

    def __aiter__(self) -> AsyncIterator[SourceBatch]:
        return self._batches()

    def acknowledge(self, acknowledge: int) -> None:
        """Nothing upstream waits for it."""

    async def _batches(self) -> AsyncIterator[SourceBatch]:
        # Also without a gap, the history must learn that somebody has read: the next to open it continues.
        yield self._batch([_resync(_ALL)] if self._is_gap else [], [self._mark] * self._is_gap, None)
        while True:
            await self._link.wait(BATCH_SECONDS)
            yield await self._next()
            await self._link.supervise()

    async def _next(self) -> SourceBatch:
        payloads, doubts, proven_until = self._link.take()
        bodies: list[Body] = []
        marks: list[str] = []
        for name, data in payloads:
            try:
                read = await self._reader.read(data)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                doubts.add(name)
                continue
            self._watermark = self._mark + data["commit_timestamp"]
            bodies += read
            marks += [self._watermark] * len(read)
        doubted = [_ALL] if _ALL in doubts else sorted(doubts)
        bodies += map(_resync, doubted)
        marks += [self._watermark] * len(doubted)
        return self._batch(bodies, marks, proven_until)

    def _batch(self, bodies: list[Body], marks: list[str], proven_until: float | None) -> SourceBatch:
        return SourceBatch(tuple(bodies), tuple(marks), self._watermark, None, proven_until)


def _resync(table: str) -> Control:
    return Control("resync", table, "upstream_gap", commit_time=time.time_ns() // 1000)


# -- the link: all supervision is here -------------------------------------------------------------------------------


@dataclass
class _Heartbeat:
    """The newest one sent: when by the monotonic clock, and when by the wall clock."""

    ref: str
    sent: float
    sent_at: float
    is_answered: bool = False


class _Link:
    """What one channel has heard, and whether it can still be believed.

    The `on_…` methods are the client's callbacks, and cannot wait. They must not raise: that would end the client's
    listening without a word, and only an unanswered heartbeat would show it.
    """

    def __init__(self, client: AsyncRealtimeClient, tables: Sequence[str]) -> None:
        self._client = client
        self._tables = tables
        self._is_live = False
        self._failure: str | None = None
        self._settled = asyncio.Event()
        self._news = asyncio.Event()
        self._waiting: deque[tuple[str, Mapping[str, Any]]] = deque()
        self._doubts: set[str] = set()
        self._heartbeat: _Heartbeat | None = None
        self._proven_until: float | None = None

    async def subscribe(self) -> None:
        """Join one channel with a binding per table, and wait until changes flow.

        Raises:
            SourceError: the server refused, or took too long.
        """
        self._client.channels[_PHOENIX] = _HeartbeatChannel(self._client, self.on_heartbeat_reply)
        channel = self._client.channel(_TOPIC).on_system(self.on_system)
        for name in self._tables:
            schema, _, table = name.partition(".")
            every = RealtimePostgresChangesListenEvent.All
            channel.on_postgres_changes(every, partial(self.on_change, name), table=table, schema=schema)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await channel.subscribe(self.on_status)
                await self._settled.wait()
        except TimeoutError:
            raise SourceError("Supabase Realtime did not subscribe in time") from None
        if self._failure is not None:
            raise SourceError(self._failure)

    def on_change(self, name: str, payload: PostgresChangesPayload) -> None:
        """A change for the binding of table `name`; to the server a `_` in a name is any letter."""
        data = payload["data"]
        if f"{data['schema']}.{data['table']}" != name:
            return
        if data["errors"] or len(self._waiting) >= MOST_WAITING:
            self.doubt(name)
        else:
            self._waiting.append((name, data))
            self._news.set()

    def on_system(self, payload: SuccessSystemPayload) -> None:
        """The first of these means that changes flow, any other that the subscription was made anew."""
        if payload.message == SUBSCRIBED:
            if self._is_live:
                self.doubt(_ALL)
            self._is_live = True
            self._settled.set()

    def on_status(self, status: RealtimeSubscribeStates, error: Exception | None) -> None:
        """Any status but SUBSCRIBED is the end of this link."""
        if status is not RealtimeSubscribeStates.SUBSCRIBED:
            self._failure = f"Supabase Realtime: {status.value}" + (f": {error}" if error else "")
            self._settled.set()
            self._news.set()

    def on_heartbeat_reply(self, ref: str | None) -> None:
        """Replies to the client's own heartbeats have no ref: nobody knows when those were sent."""
        if self._heartbeat is not None and ref == self._heartbeat.ref:
            self._heartbeat.is_answered = True
            self._proven_until = self._heartbeat.sent_at - POLL_SECONDS

    def doubt(self, table: str) -> None:
        """Changes of this table, or of all, may have been missed."""
        self._doubts.add(table)
        self._news.set()

    async def wait(self, timeout: float) -> None:
        """Wait for something to take, at most `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()

    def take(self) -> tuple[list[tuple[str, Mapping[str, Any]]], set[str], float | None]:
        """All changes received, all doubts, and until when nothing is missing beside them (None: nothing new)."""
        taken = list(self._waiting), self._doubts, self._proven_until
        self._waiting.clear()
        self._doubts, self._proven_until = set(), None
        self._news.clear()
        return taken

    async def supervise(self) -> None:
        """Ask for a sign of life when it is time.

        Raises:
            SourceError: the link has failed, or has been silent for too long.
        """
        if self._failure is not None:
            raise SourceError(self._failure)
        now = time.monotonic()
        if self._heartbeat is not None:
            age = now - self._heartbeat.sent
            if age > SILENCE_SECONDS and not self._heartbeat.is_answered:
                raise SourceError(f"Supabase Realtime left a heartbeat unanswered for {SILENCE_SECONDS:.0f} s")
            if age < HEARTBEAT_SECONDS or not self._heartbeat.is_answered:
                return
        if not self._client.is_connected:  # what it cannot send, the client would put by without limit
            raise SourceError("Supabase Realtime: disconnected")
        self._heartbeat = _Heartbeat(f"bridge-{now}", now, time.time())
        event = ChannelEvents.heartbeat
        try:
            await self._client.send(Message(topic=_PHOENIX, event=event, payload={}, ref=self._heartbeat.ref))
        except (OSError, WebSocketException) as error:
            raise SourceError(f"Supabase Realtime: {type(error).__name__}") from None


class _HeartbeatChannel(AsyncRealtimeChannel):
    """Hears the replies to heartbeats, which the client lets drop for want of a channel of that topic.

    Heartbeats are the only exchange that Supabase neither bills nor counts. Should a later client not hand them on,
    they count as unanswered: the source fails, and does not fall silent.
    """

    def __init__(self, client: AsyncRealtimeClient, heard: Callable[[str | None], None]) -> None:
        super().__init__(client, _PHOENIX)
        self._heard = heard

    def _handle_message(self, message: ServerMessage) -> None:
        if isinstance(message, ReplyMessage):
            self._heard(message.ref)


class _UnreadableFrames(logging.Filter):
    """Takes note of frames that the client cannot read, and keeps them, with their rows, out of the log.

    Its log line is the only sign that the client gives of them; `Error 401` and `Error 400` are of this kind, since
    they come without a commit timestamp.
    """

    def __init__(self, doubt: Callable[[str], None]) -> None:
        super().__init__()
        self._doubt = doubt

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the line if it is of that kind."""
        is_unreadable = str(record.msg).startswith("Unrecognized message format")
        if is_unreadable:
            self._doubt(_ALL)
        return not is_unreadable


@contextmanager
def _watching_unreadable_frames(link: _Link) -> Iterator[None]:
    client_logger = logging.getLogger(AsyncRealtimeClient.__module__)
    watch = _UnreadableFrames(link.doubt)
    client_logger.addFilter(watch)
    try:
        yield
    finally:
        client_logger.removeFilter(watch)


@asynccontextmanager
async def _linked(url: str, key: str, tables: Sequence[str]) -> AsyncIterator[_Link]:
    """A live link, on a client of its own.

    Raises:
        ConfigurationError: address or key can never work.
        SourceError: it does not work now.
    """
    options = AsyncClientOptions(auto_refresh_token=False, persist_session=False, realtime={"auto_reconnect": False})
    try:
        client = await acreate_client(url, key, options)
    except (AsyncSupabaseException, ValueError):
        raise ConfigurationError("SUPABASE_URL, SUPABASE_KEY: an http(s) address and a service key") from None
    link = _Link(client.realtime, tables)
    try:
        with _watching_unreadable_frames(link):
            await _subscribe(link)
            yield link
    finally:
        await _close(client.realtime)
        await client.auth.close()


async def _subscribe(link: _Link) -> None:
    try:
        await link.subscribe()
    except SourceError:
        raise
    except InvalidStatus as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigurationError("SUPABASE_KEY: the project refuses this key") from None
        raise SourceError(f"Supabase Realtime cannot be reached: status {status}") from None
    except OSError as error:
        raise SourceError(f"Supabase Realtime cannot be reached: {error}") from None
    except Exception as error:  # the client raises bare ones; their texts may hold the address, and so the key
        raise SourceError(f"Supabase Realtime cannot be reached: {type(error).__name__}") from None


async def _close(client: AsyncRealtimeClient) -> None:
    """Close within `CLOSE_SECONDS`; a second call ends what a peer that does not answer has left."""
    with suppress(TimeoutError, OSError, WebSocketException):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()
    await client.close()


# -- payloads: from JSON back to Postgres' texts ---------------------------------------------------------------------


class PayloadReader:
    """Makes bodies of payloads, and remembers what it has learned of each table."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._relations: dict[str, Relation] = {}
        self._identities: dict[str, frozenset[str]] = {}
        self._newest: OrderedDict[tuple[str, Image], tuple[int, float]] = OrderedDict()

    async def read(self, data: Mapping[str, Any]) -> list[Body]:
        """Read the `data` of a `postgres_changes` payload: the change, unless it was told before.

        A `catalog` control goes before it where the table has changed, or more is known of it.

        Raises:
            ArithmeticError, LookupError, TypeError, ValueError: it cannot be understood, or lacks its key.
        """
        columns = tuple(Column(c["name"], c["type"]) for c in data["columns"])
        record, old_record = data.get("record"), data.get("old_record")
        known = self._relations.get(f"{data['schema']}.{data['table']}")
        relation = await self._relation(data["schema"], data["table"], columns, old_record)
        self._relations[relation.name] = relation
        operation = data["type"].value
        if operation not in ("INSERT", "UPDATE", "DELETE"):
            raise ValueError("an unknown operation")
        change = Change(
            operation=operation,
            relation=relation,
            old=_image(relation, old_record) if old_record else None,
            new=None if operation == "DELETE" else _image(relation, record or {}),
            commit_time=parse_timestamp(data["commit_timestamp"]),
            place=f"supabase {data['commit_timestamp']}",
        )
        row = change.old if change.new is None else change.new
        if row is None or ABSENT in (key := relation.key_of(row)):
            raise ValueError("a row without its key")
        bodies: list[Body] = []
        if known not in (None, relation):
            bodies.append(Control("catalog", relation.name, commit_time=change.commit_time))
        if not relation.key or not self._is_repeat(change, key):
            bodies.append(change)
        return bodies

    async def _relation(
        self, schema: str, table: str, columns: tuple[Column, ...], old_record: Mapping[str, Any] | None
    ) -> Relation:
        name = f"{schema}.{table}"
        known = self._relations.get(name)
        present = {column.name for column in columns}
        if self._keys is not None:
            if known is not None and known.columns == columns:
                return known
            identity = frozenset(await self._keys(name))
        else:
            if old_record and old_record.keys() < present:
                self._identities[name] = frozenset(old_record)
            identity = self._identities.get(name, frozenset({"id"} & present))
        key = tuple(i for i, column in enumerate(columns) if column.name in identity)
        return Relation(schema, table, columns, key, full=False)

    def _is_repeat(self, change: Change, key: Image) -> bool:
        """Whether it equals the newest change of its row: only that much can be left out without harm."""
        now = time.monotonic()
        place = change.relation.name, key
        digest = hash((change.operation, change.commit_time, change.old, change.new))
        before = self._newest.pop(place, None)
        self._newest[place] = digest, now
        if len(self._newest) > REPEAT_KEYS:
            self._newest.popitem(last=False)
        return before is not None and before[0] == digest and now - before[1] < REPEAT_SECONDS


def parse_timestamp(text: str) -> int:
    """An ISO 8601 time with an offset as microseconds since 1970.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without an offset")
    return (moment - datetime.fromisoformat("1970-01-01T00:00:00Z")) // timedelta(microseconds=1)


def _image(relation: Relation, record: Mapping[str, Any]) -> Image:
    return tuple(to_text(c.type, record[c.name]) if c.name in record else ABSENT for c in relation.columns)


def to_text(type_: str, value: Any) -> str | None:
    """The text of a value as Postgres' output function writes it, from its JSON.

    Raises:
        ValueError, TypeError: JSON has no such value for this type.
    """
    if value is None:
        return None
    if type_.startswith("_") and isinstance(value, list):
        return _array_text(type_[1:], value)
    if type_ in ("json", "jsonb"):
        return _json_text(value)
    if isinstance(value, str):
        return _TEXTS.get(type_, str)(value)
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, int | float):
        return _number_text(type_, value)
    return _json_text(value)


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


_MOMENT: Final = re.compile(r"(\d{4,}-\d\d-\d\d)T([\d:.]+)(?:([+-]\d\d):00)?( BC)?")


def _moment_text(value: str) -> str:
    """`2026-01-01T00:00:00+00:00` as `2026-01-01 00:00:00+00`; `infinity` as it is."""
    match = _MOMENT.fullmatch(value)
    return f"{match[1]} {match[2]}{match[3] or ''}{match[4] or ''}" if match else value


_TEXTS: Final[Mapping[str, Callable[[str], str]]] = {
    "timestamp": _moment_text,
    "timestamptz": _moment_text,
    "bytea": lambda value: "\\x" + value,
}


def _number_text(type_: str, value: float) -> str:
    if type_ in ("float4", "float8"):
        return _float_text(float(value))
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError("a number beyond the range of a double")
    return format(Decimal(repr(value)), "f")


def _float_text(value: float) -> str:
    """Shortest digits, with an exponent below 1e-4 and from 1e15 on. Source: float8out_internal, d2s_full.c."""
    if not math.isfinite(value):
        raise ValueError("a number beyond the range of a double")
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int), "finite"
    leading = len(digits) + exponent - 1
    if value and not -4 <= leading < 15:
        figures = "".join(map(str, digits))
        return f"{'-' * sign}{figures[0]}{'.' * (len(figures) > 1)}{figures[1:]}e{leading:+03d}"
    return format(Decimal(repr(value)).normalize(), "f")


_BARE: Final = re.compile(r'(?!null\Z)[^{}",;\\\s]+', re.IGNORECASE)


def _array_text(type_: str, values: list[Any]) -> str:
    delimiter = ";" if type_ == "box" else ","
    return "{" + delimiter.join(_element_text(type_, value) for value in values) + "}"


def _element_text(type_: str, value: Any) -> str:
    if isinstance(value, list) and type_ not in ("json", "jsonb"):
        return _array_text(type_, value)
    # Within an array, bytea keeps its prefix: Supabase takes it off whole values only.
    text = value if type_ == "bytea" else to_text(type_, value)
    if text is None:
        return "NULL"
    if _BARE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
