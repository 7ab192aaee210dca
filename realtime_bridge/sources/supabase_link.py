"""One subscription to Supabase Realtime through the official client, and whether it can still be believed.

The client's own reconnecting is switched off, since it gives up for good after some tries and repeats the join in ways
that real servers answer by closing the channel. A link that has failed stays failed; whoever wants to read on makes
another, on a client of its own.

Alive means: a heartbeat of ours was answered. A broadcast to ourselves would prove no more, since the server tells of a
channel's end on the same ordered connection, and it would be billed and counted against the project's limits. That the
server's poller behind it is alive, too, only a change can prove: with a canary, that is asked for as well.

Layer: adapters. May import: errors, wire.phoenix, sources.supabase_canary.
Sources: realtime 2.34.1 (`_async/client.py`, `_async/channel.py`); https://supabase.com/docs/guides/realtime/protocol.
"""

import ast
import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec

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
from websockets.exceptions import InvalidStatus

from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources.supabase_canary import RETURN_SECONDS, Canary
from realtime_bridge.wire.phoenix import SUBSCRIBED

ALL: Final = "*"
"""In place of a table: all of them."""

OPEN_SECONDS: Final = 15.0
"""A cold server takes up to 8 s to subscribe, and delays refusals by 2 to 5 s on purpose."""
CLOSE_SECONDS: Final = 2.0
HEARTBEAT_SECONDS: Final = 2.0
SILENCE_SECONDS: Final = 8.0
"""A heartbeat unanswered for so long means a link that is dead, whatever it says of itself."""
POLL_SECONDS: Final = 2.0
"""How far the server's poller may trail a commit: it polls every 0.1 to 0.5 s."""
MOST_WAITING: Final = 4_000
MOST_WAITING_BYTES: Final = 64 * 2**20
"""Changes received but not yet taken, and about how long they are as text; what comes beyond is a doubt."""

_PHOENIX: Final = "phoenix"
_TOPIC: Final = "realtime-bridge"

P = ParamSpec("P")


class Received(NamedTuple):
    """What a link has heard since the last time.

    Attributes:
        payloads: for each change its table, `schema.table`, and the `data` of its payload, in the order received.
        doubts: tables, or `ALL`, of which changes may be missing among them or behind them.
        proven_until: seconds since 1970: of all that was committed before, nothing is missing beside the doubts. None
            if that is not known anew.
    """

    payloads: list[tuple[str, Mapping[str, Any]]]
    doubts: set[str]
    proven_until: float | None


@dataclass
class _Heard:
    """What waits to be taken. It never holds more than the two limits allow."""

    payloads: deque[tuple[str, Mapping[str, Any]]] = field(default_factory=deque)
    size: int = 0
    doubts: set[str] = field(default_factory=set)
    proven_until: float | None = None

    def add(self, table: str, data: Mapping[str, Any]) -> None:
        size = len(repr((data.get("record"), data.get("old_record"))))
        if len(self.payloads) >= MOST_WAITING or self.size + size > MOST_WAITING_BYTES:
            self.doubts.add(table)
            return
        self.payloads.append((table, data))
        self.size += size


@dataclass
class _Heartbeat:
    """The newest one sent: when by the monotonic clock, and when by the wall clock."""

    ref: str
    sent: float
    sent_at: float
    is_answered: bool = False


def _never_raising(callback: Callable[Concatenate["Link", P], None]) -> Callable[Concatenate["Link", P], None]:
    """Make a callback fail the link instead: raising would end the client's listening without a word."""

    @wraps(callback)
    def call(link: "Link", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(link, *args, **kwargs)
        except Exception as error:  # whatever it is; its text may hold a row
            link.fail(f"hearing it failed: {type(error).__name__}")

    return call


class Link:
    """What one channel has heard, and whether it can still be believed.

    The `on_…` methods are the client's callbacks, and cannot wait. Made by `linked` alone.
    """

    def __init__(self, client: AsyncRealtimeClient, tables: Sequence[str], canary: Canary | None) -> None:
        self._client = client
        self._tables = tables
        self._canary = canary
        self._is_live = False
        self._failure: str | None = None
        self._settled = asyncio.Event()
        self._news = asyncio.Event()
        self._heard = _Heard()
        self._heartbeat: _Heartbeat | None = None

    async def subscribe(self) -> None:
        """Join one channel with a binding per table, and wait until changes flow.

        Raises:
            SourceError: the server refused, or took longer than `OPEN_SECONDS`.
        """
        self._client.channels[_PHOENIX] = _HeartbeatChannel(self._client, self.on_heartbeat_reply)
        channel = self._client.channel(_TOPIC).on_system(self.on_system)
        callbacks = {name: partial(self.on_change, name) for name in self._tables}
        if self._canary is not None:
            callbacks[self._canary.table] = partial(self.on_canary, self._canary)
        for name, callback in callbacks.items():
            schema, _, table = name.partition(".")
            channel.on_postgres_changes(RealtimePostgresChangesListenEvent.All, callback, table=table, schema=schema)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await channel.subscribe(self.on_status)
                await self._settled.wait()
        except TimeoutError:
            raise SourceError("Supabase Realtime did not subscribe in time") from None
        self._require_health()
        if self._canary is not None:
            self._canary.begin()

    @_never_raising
    def on_change(self, name: str, payload: PostgresChangesPayload) -> None:
        """A change for the binding of table `name`; to the server a `_` in a name is any letter."""
        data = payload["data"]
        if f"{data['schema']}.{data['table']}" != name:
            return
        if data["errors"]:
            self._heard.doubts.add(name)
        else:
            self._heard.add(name, data)
        self._news.set()

    @_never_raising
    def on_canary(self, canary: Canary, payload: PostgresChangesPayload) -> None:
        """A change for the binding of the canary's table."""
        data = payload["data"]
        if f"{data['schema']}.{data['table']}" != canary.table or data["errors"]:
            return
        returned = canary.hear(data.get("record") or {})
        if returned is None:
            return
        if returned.is_gap:
            self.doubt(ALL)
        self._heard.proven_until = returned.proven_until
        self._news.set()

    @_never_raising
    def on_system(self, payload: SuccessSystemPayload) -> None:
        """The first of these means that changes flow, any other that the subscription was made anew."""
        if payload.message == SUBSCRIBED:
            if self._is_live:
                self.doubt(ALL)
            self._is_live = True
            self._settled.set()

    @_never_raising
    def on_status(self, status: RealtimeSubscribeStates, error: Exception | None) -> None:
        """Any status but SUBSCRIBED is the end of this link."""
        if status is not RealtimeSubscribeStates.SUBSCRIBED:
            self.fail(status.value + (f": {error}" if error else ""))

    @_never_raising
    def on_heartbeat_reply(self, ref: str | None) -> None:
        """Replies to the client's own heartbeats have no ref: nobody knows when those were sent."""
        if self._heartbeat is not None and ref == self._heartbeat.ref:
            self._heartbeat.is_answered = True
            if self._canary is None:
                self._heard.proven_until = self._heartbeat.sent_at - POLL_SECONDS

    def on_unreadable(self, table: str | None) -> None:
        """A frame that the client could not read; it names a table, or none that anybody could make out."""
        self.doubt(table if table is not None and table in self._tables else ALL)

    def doubt(self, table: str) -> None:
        """Changes of this table, or of all, may have been missed."""
        self._heard.doubts.add(table)
        self._news.set()

    def fail(self, reason: str) -> None:
        """The link is of no use any more. The first reason is the one that is told."""
        self._failure = self._failure or f"Supabase Realtime: {reason}"
        self._settled.set()
        self._news.set()

    async def wait(self, timeout: float) -> None:
        """Wait for something to take, at most `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()

    def take(self) -> Received:
        """Everything heard since the last time."""
        heard, self._heard = self._heard, _Heard()
        self._news.clear()
        return Received(list(heard.payloads), heard.doubts, heard.proven_until)

    async def supervise(self) -> None:
        """Ask for a sign of life when it is time.

        Raises:
            SourceError: the link has failed, or has been silent for too long.
        """
        self._require_health()
        if self._canary is not None and self._canary.is_overdue():
            raise SourceError(f"Supabase Realtime did not tell of the canary within {RETURN_SECONDS:.0f} s")
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
        message = Message(topic=_PHOENIX, event=ChannelEvents.heartbeat, payload={}, ref=self._heartbeat.ref)
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await self._client.send(message)
        except Exception as error:  # the client raises bare ones
            raise SourceError(f"Supabase Realtime: {type(error).__name__}") from None

    def _require_health(self) -> None:
        if self._failure is not None:
            raise SourceError(self._failure)


class _HeartbeatChannel(AsyncRealtimeChannel):
    """Hears the replies to heartbeats, which the client lets drop for want of a channel of that topic.

    Heartbeats are the only exchange that Supabase neither bills nor counts. Should a later client not hand them on,
    they count as unanswered: the link fails, and does not fall silent.
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

    def __init__(self, heard: Callable[[str | None], None]) -> None:
        super().__init__()
        self._heard = heard

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the line if it is of that kind."""
        _, is_unreadable, rest = str(record.msg).partition("Unrecognized message format ")
        if is_unreadable:
            self._heard(_table_in(rest.partition("\n")[0]))
        return not is_unreadable


def _table_in(frame: str) -> str | None:
    """The table that a frame tells of, given as Python would write its text; None if it names none."""
    try:
        data = json.loads(ast.literal_eval(frame))["payload"]["data"]
        return f"{data['schema']}.{data['table']}"
    except (LookupError, RecursionError, SyntaxError, TypeError, ValueError):
        return None


@contextmanager
def _watching_unreadable_frames(link: Link) -> Iterator[None]:
    client_logger = logging.getLogger(AsyncRealtimeClient.__module__)
    watch = _UnreadableFrames(link.on_unreadable)
    client_logger.addFilter(watch)
    try:
        yield
    finally:
        client_logger.removeFilter(watch)


@asynccontextmanager
async def linked(url: str, key: str, tables: Sequence[str], canary: Canary | None = None) -> AsyncIterator[Link]:
    """A live link, on a client of its own. What is heard of a canary is told to it, and not to whoever reads the link.

    Raises:
        ConfigurationError: address or key can never work.
        SourceError: it does not work now.
    """
    options = AsyncClientOptions(auto_refresh_token=False, persist_session=False, realtime={"auto_reconnect": False})
    try:
        client = await acreate_client(url, key, options)
    except (AsyncSupabaseException, ValueError):
        raise ConfigurationError("SUPABASE_URL, SUPABASE_KEY: an http(s) address and a service key") from None
    link = Link(client.realtime, tables, canary)
    with _watching_unreadable_frames(link):  # until nothing is read any more
        try:
            await _subscribe(link)
            yield link
        finally:
            await _close(client.realtime)
            await client.auth.close()


async def _subscribe(link: Link) -> None:
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
    try:
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_SECONDS):
                await client.close()
    finally:
        await client.close()
