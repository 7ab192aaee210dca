"""The bridge's own messages as JSON bytes: the same objects on WebSocket, SSE and long poll.

docs/protocol.md is the normative text. A data message is made once per (entry, form, columns, subscription ids) and
wrapped once per encoding, whoever receives it: nothing in it depends on the user.

Layer: pure. May import: change, values.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

import orjson

from realtime_bridge.change import Change, Relation
from realtime_bridge.values import encode_image


class Form(Enum):
    """What a change looks like to one reader."""

    INSERT = "INSERT"
    """A new row, or one that enters what the reader sees: no old row."""
    UPDATE = "UPDATE"
    """Seen before and after: with the old row."""
    UPDATE_KEY = "UPDATE_KEY"
    """Seen after; what was before is not known: `old_record` is the key alone."""
    DELETE = "DELETE"
    """Seen before, gone now: with the old row."""
    LEAVE = "LEAVE"
    """Seen before; still there, but not for this reader: the key alone, marked `left`."""

    @property
    def operation(self) -> str:
        """The message's `type`."""
        return _OPERATIONS[self]


_OPERATIONS: Final = {
    Form.INSERT: "INSERT",
    Form.UPDATE: "UPDATE",
    Form.UPDATE_KEY: "UPDATE",
    Form.DELETE: "DELETE",
    Form.LEAVE: "DELETE",
}


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as UTC text with milliseconds, truncated: `2026-01-02T03:04:05.678Z`."""
    return microtimestamp(int(seconds * 1_000_000))


def microtimestamp(microseconds: int) -> str:
    """Microseconds since 1970 as UTC text with milliseconds, truncated."""
    whole, part = divmod(microseconds, 1_000_000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{part // 1000:03}Z"


def change_message(
    change: Change, form: Form, position: str, *, columns: Sequence[str] | None = None, ids: Sequence[str] = ()
) -> bytes:
    """One data message.

    `columns` are those to show beside the primary key (None: all); `ids` the subscriptions made by message that it is
    for (empty: the one made by the address).
    """
    relation = change.relation
    shown = None if columns is None else _with_key(relation, columns)
    key = [relation.columns[i].name for i in relation.key]
    parts = [
        b'{"type":"',
        form.operation.encode(),
        b'","schema":',
        orjson.dumps(relation.schema),
        b',"table":',
        orjson.dumps(relation.table),
    ]
    if change.new is not None and form in (Form.INSERT, Form.UPDATE, Form.UPDATE_KEY):
        parts += (b',"record":', encode_image(relation, change.new, shown))
    if form is not Form.INSERT:
        before = change.new if change.old is None else change.old
        assert before is not None, "a change has an old row or a new one"
        only = shown if form in (Form.UPDATE, Form.DELETE) else key
        parts += (b',"old_record":', encode_image(relation, before, only))
    if form is Form.LEAVE:
        parts.append(b',"left":true')
    if change.repaired:
        parts.append(b',"repaired":true')
    parts.append(f',"commit_timestamp":"{microtimestamp(change.commit_time)}","position":"{position}"'.encode())
    if ids:
        parts += (b',"subscriptions":', orjson.dumps(list(ids)))
    parts.append(b"}")
    return b"".join(parts)


def _with_key(relation: Relation, columns: Sequence[str]) -> list[str]:
    key = {relation.columns[i].name for i in relation.key}
    return [column.name for column in relation.columns if column.name in key or column.name in columns]


def _message(type_: str, fields: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"type": type_, **{name: value for name, value in fields.items() if value is not None}})


def ready(
    *,
    connection_id: str,
    position: str,
    complete_until: float | None,
    tables: Iterable[str],
    expires_at: float | None,
    ping_seconds: float,
) -> bytes:
    """The first message; `position` is where reading starts."""
    return _message(
        "ready",
        {
            "connection_id": connection_id,
            "position": position,
            "complete_until": optional_timestamp(complete_until),
            "tables": list(tables),
            "expires_at": optional_timestamp(expires_at),
            "ping_seconds": ping_seconds,
        },
    )


def subscribed(id_: str, table: str, position: str) -> bytes:
    """A subscription by message stands; it reads from `position`."""
    return _message("subscribed", {"id": id_, "table": table, "position": position})


def unsubscribed(id_: str) -> bytes:
    """A subscription by message has ended."""
    return _message("unsubscribed", {"id": id_})


def resync(table: str, reason: str, position: str, after_ms: int, ids: Sequence[str] = ()) -> bytes:
    """The reader's copy may be out of date."""
    return _message(
        "resync",
        {
            "table": table,
            "reason": reason,
            "position": position,
            "after_ms": after_ms,
            "subscriptions": list(ids) or None,
        },
    )


def ping(position: str, complete_until: float | None) -> bytes:
    """A sign of life that moves the position on."""
    return _message("ping", {"position": position, "complete_until": optional_timestamp(complete_until)})


def pong(position: str, complete_until: float | None) -> bytes:
    """The answer to a client's ping."""
    return _message("pong", {"position": position, "complete_until": optional_timestamp(complete_until)})


def auth_expiring(expires_at: float) -> bytes:
    """The token ends within a minute."""
    return _message("auth_expiring", {"expires_at": timestamp(expires_at)})


def error(code: int, detail: str, id_: str | None = None) -> bytes:
    """A request was refused; the connection lives on. `code` is the close code that would say the same."""
    return _message("error", {"code": code, "detail": detail, "id": id_})


def optional_timestamp(seconds: float | None) -> str | None:
    """`timestamp`, or None for None and for 0 (never)."""
    return timestamp(seconds) if seconds else None
