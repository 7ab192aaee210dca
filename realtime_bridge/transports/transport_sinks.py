"""Sinks that are the transport itself, once the ASGI call has ended: one small object per client, and nothing else.

Layer: edges. May import: wire, hub.base.
Sources: RFC 6455, sections 5.5 and 7; the HTML standard, section 9.2 (Server-Sent Events); asyncio's transports and
protocols; tcp(7) for TCP_NOTSENT_LOWAT and TCP_USER_TIMEOUT.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, cast

from realtime_bridge.hub.base import Encoding, Receiver
from realtime_bridge.wire import native
from realtime_bridge.wire.frames import (
    BINARY,
    CLOSE,
    PING,
    FrameError,
    FrameParser,
    close_frame,
    ping_frame,
    pong_frame,
)
from realtime_bridge.wire.sse import COMMENT, retry_event, wrap_event

logger = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 10.0
"""How long a peer may take to join in a close before it is dropped."""

_NOTSENT_BYTES: Final = 16 * 1024
"""Unsent bytes the kernel takes over for one socket: little enough that what a slow reader owes is seen in the
transport's buffer. What is on its way is not counted, so a far link stays busy: with 100 ms of round trip one
connection carried 27 MB/s, and 30 without the limit."""

UNACKNOWLEDGED_SECONDS: Final = 30.0
"""How long the peer of anything but a WebSocket, which has pongs, may leave bytes unacknowledged, or its window closed,
before it counts as gone. The bytes may be those of a ping, so that it is noticed half a minute after one is due."""

_PING: Final = (ping_frame(),)
_COMMENT: Final = (COMMENT,)


def tell_of_shutdown(app_state: Mapping[str, Any]) -> None:
    """Have the bridge of an application drain, if there is one: the server is being stopped."""
    bridge = app_state.get("realtime_bridge")
    if bridge is not None:
        bridge.drain()


class _TransportSink(asyncio.Protocol):
    """What every sink that is the transport itself has in common: writing, owing, closing, being lost.

    Reading never stops, so that the end of the link is always noticed; what arrives is either handed on or dropped.

    Args:
        connections, app_state: the server's, as its protocols have them.
    """

    __slots__ = ("_app_state", "_connections", "_open", "_receiver", "_timer", "_transport", "full")

    restart_spread_seconds: ClassVar[float] = 3.0
    """On shutdown each client is told to come back after a random time up to this one."""

    def __init__(
        self,
        transport: asyncio.Transport,
        connections: set[Any],
        app_state: Mapping[str, Any],
        *,
        send_buffer_bytes: int,
    ) -> None:
        self.full = False
        self._transport = transport
        self._connections = connections
        self._app_state = app_state
        self._receiver: Receiver = _NOBODY
        self._timer: asyncio.TimerHandle | None = None
        self._open = True  # neither side has begun to close
        transport.set_write_buffer_limits(high=send_buffer_bytes, low=send_buffer_bytes // 4)
        _show_owed_bytes(transport)

    def serve(self, receiver: Receiver) -> None:
        """Take the transport from the protocol that has it."""
        self._receiver = receiver
        self._connections.add(self)
        self._transport.set_protocol(self)

    # Sink

    def write(self, messages: Sequence[bytes]) -> None:
        if self._open and not self._transport.is_closing():
            self._transport.write(messages[0] if len(messages) == 1 else b"".join(messages))

    def abort(self) -> None:
        self._open = False
        self._transport.abort()

    # asyncio.Protocol

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        # With TLS this may be called from within `write`, and a receiver must not.
        asyncio.get_running_loop().call_soon(self._tell_room)

    def eof_received(self) -> None:
        self._begin_close()  # the transport closes by itself, but would wait for ever for a peer that reads nothing

    def connection_lost(self, exc: Exception | None) -> None:
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        self._connections.discard(self)
        receiver, self._receiver = self._receiver, _NOBODY
        receiver.lost()

    # what uvicorn asks of each member of `server_state.connections`

    def shutdown(self) -> None:
        """Ask the client to come back, at a time of its own."""
        tell_of_shutdown(self._app_state)  # every one: there may be no other connection
        self._ask_to_come_back(random.randint(0, round(self.restart_spread_seconds * 1000)))

    def _ask_to_come_back(self, after_ms: int) -> None:
        raise NotImplementedError

    # inside

    def _begin_close(self) -> None:
        if self._open:
            self._open = False
            self._timer = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def _tell_room(self) -> None:
        if self._open and not self.full:
            self._receiver.room()


class SocketSink(_TransportSink):
    """A WebSocket after its handshake, as a `Sink`: all that is kept for one client below the hub."""

    __slots__ = ("_listening", "_owed_pong", "_parser")

    encoding = Encoding.FRAME

    def __init__(
        self,
        transport: asyncio.Transport,
        connections: set[Any],
        app_state: Mapping[str, Any],
        *,
        send_buffer_bytes: int,
    ) -> None:
        super().__init__(transport, connections, app_state, send_buffer_bytes=send_buffer_bytes)
        drop_unacknowledged(transport, 0)
        self._parser = FrameParser()
        self._owed_pong: bytes | None = None
        self._listening = True  # what arrives can still be understood

    # Sink

    def ping(self) -> None:
        self.write(_PING)

    def close(self, code: int, reason: str = "") -> None:
        self.write((close_frame(code, reason),))
        self._begin_close()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        if not self._listening:
            return
        if self._open:
            self._receiver.alive()
        try:
            for opcode, payload in self._parser.feed(data):
                self._take(opcode, payload)
        except FrameError as error:
            self._refuse(error.code, error.reason)
            self._hang_up()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._owed_pong is not None:
            payload, self._owed_pong = self._owed_pong, None
            self.write((pong_frame(payload),))

    def connection_lost(self, exc: Exception | None) -> None:
        self._listening = False
        super().connection_lost(exc)

    # inside

    def _ask_to_come_back(self, after_ms: int) -> None:
        self.close(1012, f"retry in {after_ms} ms")

    def _take(self, opcode: int, payload: str | bytes) -> None:
        if opcode == CLOSE:
            self._answer_close(cast("bytes", payload))
        elif not self._open:
            pass  # RFC 6455, 1.4: after a close nothing counts but the other close
        elif isinstance(payload, str):
            self._receiver.received(payload)
        elif opcode == PING:
            self._answer_ping(payload)
        elif opcode == BINARY:
            self._refuse(4400, "binary messages are not understood")

    def _answer_ping(self, payload: bytes) -> None:
        """Answer, but one who reads nothing gets one pong for all pings: RFC 6455, 5.5.3."""
        if self.full:
            self._owed_pong = payload
        else:
            self.write((pong_frame(payload),))

    def _answer_close(self, payload: bytes) -> None:
        """Echo the code if the peer was first, then end the connection, as a server is to do."""
        self.write((_echo(payload),))
        self._begin_close()
        self._listening = False
        self._transport.close()

    def _refuse(self, code: int, reason: str) -> None:
        """Close because of what the peer did; said in the log once, since `close` can be only once."""
        if self._open:
            logger.info("client refused", extra={"close_code": code, "reason": reason})
        self.close(code, reason)

    def _hang_up(self) -> None:
        """Half-close: closing at once, with bytes unread, could make the peer's kernel drop our last words."""
        self._listening = False
        if not self._transport.can_write_eof():  # TLS
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write_eof()


class EventSink(_TransportSink):
    """A response of Server-Sent Events after its headers, as a `Sink`. Its end is the end of the body.

    The protocol has no pongs: a comment is written, and TCP must have it acknowledged in time.
    """

    __slots__ = ()

    encoding = Encoding.EVENT

    # Sink

    def ping(self) -> None:
        self.write(_COMMENT)
        asyncio.get_running_loop().call_soon(self._pretend_pong)

    def close(self, code: int, reason: str = "") -> None:
        """End the body; a refusal is told first, since there is no other place for it."""
        if self._open:
            self.write((wrap_event(native.error(code, reason)),))
            self._end()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        if self._open:
            self._receiver.alive()

    # inside

    def _ask_to_come_back(self, after_ms: int) -> None:
        if self._open:
            self.write((retry_event(after_ms),))
            self._end()

    def _end(self) -> None:
        self._begin_close()
        self._transport.close()

    def _pretend_pong(self) -> None:
        if self._open:
            self._receiver.alive()


_EMPTY_CLOSE: Final = b"\x88\x00"


def _echo(payload: bytes) -> bytes:
    """The close frame that answers one of that payload: the same code, no reason."""
    return close_frame(int.from_bytes(payload[:2], "big")) if payload else _EMPTY_CLOSE


def _show_owed_bytes(transport: asyncio.Transport) -> None:
    """Keep what the peer has not taken yet out of the kernel, whose own buffer can hide megabytes of it."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    sock = transport.get_extra_info("socket")
    if option is not None and sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # the peer may be gone already
            sock.setsockopt(socket.IPPROTO_TCP, option, _NOTSENT_BYTES)


def drop_unacknowledged(transport: asyncio.Transport, after_seconds: float) -> None:
    """Let the kernel end a link whose peer vanished or takes nothing any more; 0 leaves it as the system has it."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    sock = transport.get_extra_info("socket")
    if option is not None and sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # the peer may be gone already
            sock.setsockopt(socket.IPPROTO_TCP, option, int(after_seconds * 1000))


class _Nobody:
    """The receiver of a sink that has none yet, or none any more."""

    def received(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def room(self) -> None: ...

    def lost(self) -> None: ...


_NOBODY: Final = _Nobody()
