"""WebSocket frames, server side, without extensions.

Prepared messages are whole frames, made once and written as they are to any number of transports; what comes back is
small and rare, so the parser is built to weigh next to nothing between messages rather than to be fast within them.

Layer: pure. May import: words.
Sources: RFC 6455, sections 5 (framing), 7.4 (close codes) and 8.1 (UTF-8); IANA's WebSocket close code registry.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from realtime_bridge.errors import MessageTooLargeError

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without websockets' C extension
    from websockets.utils import apply_mask

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

MESSAGE_BYTES: Final = 64 * 1024
"""The largest message a client may send."""

CONTROL_BYTES: Final = 125
"""The largest payload of a control frame."""

_FIN = 0x80
_RSV = 0x70
_MASKED = 0x80
_OPCODE = 0xF
_REGISTERED_CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, *range(1007, 1015)})


class FrameError(Exception):
    """What the peer sent ends the connection.

    Attributes:
        code: the close code that says why: 1002, 1007 or 4413.
        reason: the close reason, fit to be sent to the peer.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


def text_frame(payload: bytes) -> bytes:
    """A whole text message; `payload` is UTF-8 of any length."""
    return _frame(TEXT, payload)


def ping_frame(payload: bytes = b"") -> bytes:
    """A ping; `payload` is at most 125 bytes."""
    return _control_frame(PING, payload)


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping of that payload."""
    return _control_frame(PONG, payload)


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; a reason that does not fit is cut."""
    return _control_frame(CLOSE, code.to_bytes(2, "big") + clip_reason(reason).encode())


def clip_reason(reason: str) -> str:
    """Cut a close reason to the 123 bytes that a close frame has for it, between characters."""
    return reason.encode()[: CONTROL_BYTES - 2].decode(errors="ignore")


def _control_frame(opcode: int, payload: bytes) -> bytes:
    assert len(payload) <= CONTROL_BYTES
    return _frame(opcode, payload)


def _frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size <= CONTROL_BYTES:
        header = bytes((_FIN | opcode, size))
    elif size < 1 << 16:
        header = bytes((_FIN | opcode, 126)) + size.to_bytes(2, "big")
    else:
        header = bytes((_FIN | opcode, 127)) + size.to_bytes(8, "big")
    return header + payload


class _Header(NamedTuple):
    final: bool
    opcode: int
    mask_at: int
    size: int


class FrameParser:
    """Turns the bytes of one client into its messages, however they were cut on the way.

    Holds no buffer between messages. After an error, or after a close frame, it is of no more use.
    """

    __slots__ = ("_fragments", "_pending", "_size_limit", "_started")

    def __init__(self, size_limit: int = MESSAGE_BYTES) -> None:
        self._size_limit = size_limit
        self._pending: bytearray | None = None  # the beginning of a frame
        self._fragments: bytearray | None = None  # the beginning of a message
        self._started = CONTINUATION  # the opcode of that message

    def feed(self, data: bytes) -> Iterator[tuple[int, str | bytes]]:
        """Yield each message and control frame completed by `data`: opcode, and `str` for text or else `bytes`.

        Lazy, so that what came before an error is handled before the error shows. Exhaust it before feeding again.

        Raises:
            FrameError: the peer broke the protocol, or sent a message over the limit.
        """
        buffer: bytes | bytearray = data
        if self._pending is not None:
            self._pending += data
            buffer, self._pending = self._pending, None
        start = 0
        while (header := self._parse_header(buffer, start)) is not None:
            payload_at = header.mask_at + 4
            end = payload_at + header.size
            if end > len(buffer):
                break
            payload = apply_mask(bytes(buffer[payload_at:end]), bytes(buffer[header.mask_at : payload_at]))
            start = end
            if header.opcode >= CLOSE:
                yield header.opcode, _checked_close(payload) if header.opcode == CLOSE else payload
            elif (message := self._add_fragment(header, payload)) is not None:
                yield message
        if start < len(buffer):
            self._pending = buffer if isinstance(buffer, bytearray) else bytearray(buffer)
            del self._pending[:start]

    def _parse_header(self, buffer: bytes | bytearray, start: int) -> _Header | None:
        """Read and judge the header at `start`; None when it is not there in full."""
        available = len(buffer) - start
        if available < 2:
            return None
        first, second = buffer[start], buffer[start + 1]
        opcode = first & _OPCODE
        final = first >= _FIN
        self._check_order(first, second, opcode, final=final)
        size, mask_at = second & ~_MASKED, start + 2
        if size > CONTROL_BYTES:
            width, smallest = (2, 126) if size == 126 else (8, 1 << 16)
            if available < 2 + width:
                return None
            size = int.from_bytes(buffer[mask_at : mask_at + width], "big")
            mask_at += width
            if size < smallest or size >= 1 << 63:
                raise FrameError(1002, "length not encoded as it must be")
        if opcode < CLOSE and size + len(self._fragments or b"") > self._size_limit:
            raise FrameError(4000 + MessageTooLargeError.status_code, f"message over {self._size_limit} bytes")
        return _Header(final, opcode, mask_at, size)

    def _check_order(self, first: int, second: int, opcode: int, *, final: bool) -> None:
        """Refuse what no frame, or no frame at this place, may look like."""
        if first & _RSV:
            raise FrameError(1002, "reserved bits are set")
        if not second & _MASKED:
            raise FrameError(1002, "frame is not masked")
        if opcode in (CLOSE, PING, PONG):
            if not final or second & ~_MASKED > CONTROL_BYTES:
                raise FrameError(1002, "control frame is fragmented or too long")
        elif opcode > BINARY:
            raise FrameError(1002, "unknown opcode")
        elif (opcode == CONTINUATION) != (self._fragments is not None):
            raise FrameError(1002, "fragments out of order")

    def _add_fragment(self, header: _Header, payload: bytes) -> tuple[int, str | bytes] | None:
        """Take the payload of a data frame; return the message if that completes it."""
        if header.final and self._fragments is None:
            return _message(header.opcode, payload)
        if self._fragments is None:
            self._fragments, self._started = bytearray(payload), header.opcode
            return None
        self._fragments += payload
        if not header.final:
            return None
        whole, self._fragments = bytes(self._fragments), None
        return _message(self._started, whole)


def _message(opcode: int, payload: bytes) -> tuple[int, str | bytes]:
    return opcode, _text(payload) if opcode == TEXT else payload


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise FrameError(1007, "text is not UTF-8") from None


def _checked_close(payload: bytes) -> bytes:
    """The payload of a close frame, if it is one that a client may send."""
    if not payload:
        return payload
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not (code in _REGISTERED_CLOSE_CODES or 3000 <= code < 5000):
        raise FrameError(1002, "close code may not be sent")
    _text(payload[2:])
    return payload
