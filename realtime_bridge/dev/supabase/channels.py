"""The stand-in's side of one Realtime connection: its channels, and what it answers.

Layer: whole (dev). May import: errors, wire.phoenix, dev.supabase.{keys,changes}.
Sources: supabase/realtime (UserSocket, RealtimeChannel).
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from websockets.asyncio.server import ServerConnection, broadcast

from realtime_bridge.change import Relation
from realtime_bridge.dev.supabase.changes import Told
from realtime_bridge.dev.supabase.keys import Keys
from realtime_bridge.errors import BadRequestError
from realtime_bridge.wire import phoenix
from realtime_bridge.wire.phoenix import Frame, Payload, Status, Vsn

LARGEST_BACKLOG: Final = 16 * 2**20
"""Bytes that a client may owe; one that reads no more is cut off."""


@dataclass
class Rules:
    """How joins are answered, for all connections.

    Attributes:
        published: asks for schema and name of each table that can be subscribed to.
        refusal: in place of every join's answer, if it is not None.
        is_mute: joins are not answered at all.
    """

    keys: Keys
    published: Callable[[], Awaitable[list[tuple[str, str]]]]
    refusal: str | None = None
    is_mute: bool = False


@dataclass
class Channel:
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


class Socket:
    """One Realtime connection and its channels."""

    _ids = count(1)

    def __init__(self, connection: ServerConnection, rules: Rules, vsn: Vsn, key: str) -> None:
        self.channels: dict[str, Channel] = {}
        self._connection = connection
        self._rules = rules
        self._vsn = vsn
        self._key = key
        self._is_deaf = False

    def send(self, frame: Frame, *, padding: int = 0) -> None:
        """Send without waiting: a slow client must not hold up the others. `padding` adds as many bytes of space."""
        broadcast([self._connection], phoenix.encode(self._vsn, frame).decode() + " " * padding)
        if self._connection.transport.get_write_buffer_size() > LARGEST_BACKLOG:
            self._connection.transport.abort()

    def fan_out(self, change: Told, *, padding: int = 0) -> None:
        """Send a change to every channel that asked for it."""
        if self._is_deaf:
            return
        for channel in self.channels.values():
            if channel.is_live and (ids := channel.ids(change.relation, change.operation)):
                self.send(phoenix.postgres_changes(channel.topic, ids, change.data), padding=padding)

    def say(self, message: str, *, is_error: bool = False) -> None:
        """Send a `system` message to every channel that is live."""
        for channel in self.channels.values():
            if channel.is_live:
                status: Status = "error" if is_error else "ok"
                self.send(phoenix.system(channel.topic, channel.join_ref, message, status=status))

    def deafen(self) -> None:
        """Tell of no change any more, and of nothing else that would show it."""
        self._is_deaf = True

    def close_channels(self) -> None:
        """End every channel, and leave the connection open."""
        for channel in list(self.channels.values()):
            self._leave(channel)

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

    async def _act(self, channel: Channel, frame: Frame) -> None:
        token = frame.payload.get("access_token")
        if frame.event in ("presence", "broadcast"):
            self.send(phoenix.reply(frame))
        elif frame.event == "access_token" and isinstance(token, str) and token != channel.token:
            channel.token = token
            if not await self._subscribe(channel):
                self._leave(channel)

    def _leave(self, channel: Channel | None) -> None:
        if channel is not None:
            self.send(phoenix.phx_close(channel.topic, channel.join_ref))
            del self.channels[channel.topic]

    async def _join(self, frame: Frame) -> None:
        if self._rules.is_mute:
            return
        is_named = frame.topic.startswith(phoenix.PREFIX) and frame.topic != phoenix.PREFIX
        refusal = self._rules.refusal if is_named else "unmatched topic"
        if refusal is not None:
            self.send(phoenix.refusal(frame, refusal))
            return
        token = frame.payload.get("access_token") or self._key
        bindings = {next(self._ids): binding for binding in phoenix.bindings(frame)}
        channel = Channel(frame.topic, frame.ref, token, bindings)
        before, self.channels[frame.topic] = self.channels.get(frame.topic), channel
        self.send(phoenix.join_reply(frame, list(bindings)))
        if before is not None:  # said of the earlier join; the Python client takes it for the new one
            self.send(phoenix.phx_close(before.topic, before.join_ref))
        await self._subscribe(channel)

    async def _subscribe(self, channel: Channel) -> bool:
        """Make a channel live, and say so, or why not."""
        if not channel.bindings:
            return True
        problem = await self._problem(channel)
        channel.is_live = problem is None
        status: Status = "error" if problem else "ok"
        self.send(phoenix.system(channel.topic, channel.join_ref, problem or phoenix.SUBSCRIBED, status=status))
        return channel.is_live

    async def _problem(self, channel: Channel) -> str | None:
        if not self._rules.keys.is_service(channel.token):
            return "This stand-in knows no row-level security: only the service key may subscribe"
        tables = await self._rules.published()
        for binding in channel.bindings.values():
            if binding.get("filter") or binding.get("select"):
                return "This stand-in knows neither `filter` nor `select`"
            schema, table = binding.get("schema") or "public", binding.get("table") or "*"
            if not any(_matches(schema, name) and _matches(table, other) for name, other in tables):
                return (
                    "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the "
                    f"given connect parameters: [event: {binding.get('event')}, schema: {schema}, table: {table}, "
                    "filters: [], select: nil]"
                )
        return None
