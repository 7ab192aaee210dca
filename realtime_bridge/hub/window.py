"""The newest part of the history, kept by each process with its encodings made once.

Layer: core. May import: words, wire, hub.base.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

import orjson

from realtime_bridge.change import Change, Entry
from realtime_bridge.hub.base import Encoding
from realtime_bridge.wire.frames import text_frame
from realtime_bridge.wire.native import Form, change_message
from realtime_bridge.wire.sse import wrap_event

MESSAGES_KEPT: Final = 16
"""Per entry: three forms in three encodings, and some sets of columns. What is asked for beyond is made each time."""


def wrap(encoding: Encoding, message: bytes, position: str) -> bytes:
    """A JSON message as it goes over the wire in an encoding. `position` may be empty (SSE then sends no `id:`)."""
    if encoding is Encoding.FRAME:
        return text_frame(message)
    if encoding is Encoding.EVENT:
        return wrap_event(message, position)
    return message


class Prepared:
    """An entry with the messages that were made of it: the first `MESSAGES_KEPT`, since clients choose columns."""

    __slots__ = ("_messages", "entry")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._messages: dict[tuple[object, ...], bytes] = {}

    def message(
        self,
        epoch: str,
        form: Form,
        encoding: Encoding,
        columns: tuple[str, ...] | None = None,
        ids: tuple[str, ...] = (),
    ) -> bytes:
        """The change as a message. Made once, save what differs from client to client: the ids are only put in."""
        position = f"{epoch}-{self.entry.number}"
        if ids:
            json = self.message(epoch, form, Encoding.JSON, columns)
            return wrap(encoding, with_ids(json, ids), position)
        key = (form, encoding, columns, epoch)
        message = self._messages.get(key)
        if message is None:
            assert isinstance(self.entry.body, Change)
            message = wrap(encoding, change_message(self.entry.body, form, position, columns=columns), position)
            if len(self._messages) < MESSAGES_KEPT:
                self._messages[key] = message
        return message


def with_ids(message: bytes, ids: Sequence[str]) -> bytes:
    """A data message with the subscriptions it is for, as `change_message` writes them."""
    return b'%b,"subscriptions":%b}' % (message[:-1], orjson.dumps(list(ids)))


class Window:
    """A bounded run of entries without holes, oldest first.

    Args:
        size: most entries.
        max_bytes: most bytes of encoded bodies; what is prepared of them comes on top, a small multiple.
    """

    def __init__(self, *, size: int, max_bytes: int) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: deque[Prepared] = deque()
        self.last = 0
        """The newest number; also known while the window is empty."""

    @property
    def first(self) -> int:
        """The oldest number held; `last + 1` if none is."""
        return self.last - len(self._entries) + 1

    def reset(self, last: int) -> None:
        """Forget everything and stand at a number."""
        self._entries.clear()
        self._bytes = 0
        self.last = last

    def extend(self, entries: Sequence[Entry]) -> list[Prepared]:
        """Add the next entries; drop the oldest beyond the bounds."""
        prepared = [Prepared(entry) for entry in entries]
        for item in prepared:
            assert item.entry.number == self.last + 1, "the window has no holes"
            self.last = item.entry.number
            self._bytes += item.entry.size
            self._entries.append(item)
        while self._entries and (len(self._entries) > self._size or self._bytes > self._max_bytes):
            self._bytes -= self._entries.popleft().entry.size
        return prepared

    def precede(self, entries: Sequence[Entry]) -> bool:
        """Add what comes right before the oldest; False if there is no room for it, or it does not."""
        size = sum(entry.size for entry in entries)
        if not entries or entries[-1].number != self.first - 1:
            return False
        if len(self._entries) + len(entries) > self._size or self._bytes + size > self._max_bytes:
            return False
        self._entries.extendleft(Prepared(entry) for entry in reversed(entries))
        self._bytes += size
        return True

    def cut(self, number: int) -> None:
        """Forget everything after a number: it never happened."""
        if number < self.first - 1:
            self.reset(number)
            return
        while self._entries and self._entries[-1].entry.number > number:
            self._bytes -= self._entries.pop().entry.size
        self.last = number

    def after(self, number: int, limit: int) -> list[Prepared] | None:
        """The entries that follow a number, at most `limit`; None if some of them are not held any more."""
        if number < self.first - 1:
            return None
        start = number - self.first + 1
        return list(islice(self._entries, start, start + limit))

    def last_id(self) -> str | None:
        """The newest entry's id, or None while empty."""
        return self._entries[-1].entry.id if self._entries else None
