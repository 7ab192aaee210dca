"""The sink: what the hub writes to, whatever the transport.

A sink hides sockets from the hub and the hub from sockets. There are two kinds: the transport itself, once the ASGI
call has ended (`transports.uvicorn_protocol`), and plain ASGI sends (`transports.asgi`). A long poll is a sink that
collects.

Layer: core (contract). May import: words.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol


class Encoding(Enum):
    """How a message is wrapped for the wire; a prepared message is made once per encoding."""

    JSON = "json"
    """The JSON object alone."""
    FRAME = "frame"
    """An unmasked WebSocket text frame that holds the JSON object."""
    EVENT = "event"
    """A Server-Sent Event: `id:` is the position, `data:` the JSON object."""


class Sink(Protocol):
    """One client's way out. Never blocks, never raises: a sink whose peer is gone swallows what it is given."""

    encoding: Encoding

    full: bool
    """True while the peer owes reading more than `BRIDGE_SEND_BUFFER_BYTES`; the hub then stops writing, and reads from
    the history once `Receiver.room` is called."""

    def write(self, messages: Sequence[bytes]) -> None:
        """Hand over messages in this sink's encoding, in one write. Accepted also while `full`: it is a hint."""
        ...

    def ping(self) -> None:
        """Ask the peer for a sign of life, where the transport has a way to (`Receiver.alive` is the answer)."""
        ...

    def close(self, code: int, reason: str = "") -> None:
        """Close in an orderly way, once what was written is sent.

        Aborts by itself if the peer does not join in within 10 s. Idempotent. `Receiver.lost` follows.
        """
        ...

    def abort(self) -> None:
        """Drop the link at once. Idempotent. `Receiver.lost` follows."""
        ...


class Receiver(Protocol):
    """What a sink tells: implemented by the hub's connection.

    Called on the event loop, never reentrantly from a method of the sink.
    """

    def received(self, text: str) -> None:
        """The client sent a text message (at most 64 KiB; larger ones and binary ones the sink refuses itself)."""
        ...

    def alive(self) -> None:
        """Something came from the peer, if only a pong."""
        ...

    def room(self) -> None:
        """The sink was full and is not any more."""
        ...

    def lost(self) -> None:
        """The link is gone. Called exactly once, and nothing after it."""
        ...
