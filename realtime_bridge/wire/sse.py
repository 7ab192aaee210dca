"""Server-Sent Events as bytes.

No `event:` field, so that a page's `onmessage` sees all; `id:` on every message that has a position, so that a browser
comes back with it.

Layer: pure.
Sources: the HTML standard, section 9.2.6 (interpreting an event stream).
"""

from typing import Final

COMMENT: Final = b":\n\n"
"""Keeps proxies and the kernel awake; no client sees it."""


def wrap_event(message: bytes, position: str = "") -> bytes:
    """A JSON message (which holds no line break) as an event; without a position it carries no `id:`."""
    head = f"id: {position}\n".encode() if position else b""
    return head + b"data: " + message + b"\n\n"


def retry_event(milliseconds: int) -> bytes:
    """Tells the browser how long to wait before it comes back."""
    return b"retry: %d\n\n" % milliseconds
