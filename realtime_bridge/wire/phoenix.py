"""The words of the Supabase Realtime protocol: Phoenix frames of both versions, and what a server says in them.

Version 1.0.0 writes a frame as a JSON object, 2.0.0 as `[join_ref, ref, topic, event, payload]`; what is said is the
same. Official clients are particular: `ref` must be there in 1.0.0 even when null, a payload must be an object, a
binding's id an integer that is not zero, and a frame with a `join_ref` other than the channel's is dropped.

Layer: pure. May import: change, errors, values.
Sources: Phoenix.Socket.V1/V2.JSONSerializer (phoenixframework/phoenix); RealtimeChannel and MessageDispatcher
(supabase/realtime); https://supabase.com/docs/guides/realtime/protocol.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import orjson

from realtime_bridge.change import Change
from realtime_bridge.errors import BadRequestError
from realtime_bridge.values import encode_image

Vsn: TypeAlias = Literal["1.0.0", "2.0.0"]
Status: TypeAlias = Literal["ok", "error"]
Payload: TypeAlias = Mapping[str, Any]
"""A JSON object; a value may be an `orjson.Fragment`, which is JSON already."""

PHOENIX: Final = "phoenix"
"""The topic of heartbeats."""
PREFIX: Final = "realtime:"
"""What every channel's topic begins with."""
POSTGRES_CHANGES: Final = "postgres_changes"
SUBSCRIBED: Final = "Subscribed to PostgreSQL"
"""The `system` message from which on changes flow; each repeat of it means that some may have been missed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message in either direction.

    Attributes:
        ref: names a request and its reply; None for what nobody asked for.
        join_ref: the `ref` of the join that made the channel; None also where the client leaves it out.
    """

    topic: str
    event: str
    payload: Payload = field(default_factory=dict)
    ref: str | None = None
    join_ref: str | None = None


def parse_vsn(text: str | None) -> Vsn:
    """Read the `vsn` of a connection's address; left out, it is 1.0.0.

    Raises:
        BadRequestError: no such version.
    """
    match text:
        case None | "1.0.0":
            return "1.0.0"
        case "2.0.0":
            return "2.0.0"
    raise BadRequestError("vsn: 1.0.0 or 2.0.0")


def decode(vsn: Vsn, data: str | bytes) -> Frame:
    """Read a text frame; elements behind the fifth of a 2.0.0 frame are ignored.

    Raises:
        BadRequestError: it is none. A server logs that and leaves the connection open.
    """
    try:
        message = orjson.loads(data)
        if vsn == "2.0.0":
            join_ref, ref, topic, event, payload = message[:5]
        else:
            topic, event, payload, ref = (message[name] for name in ("topic", "event", "payload", "ref"))
            join_ref = message.get("join_ref")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadRequestError("not a frame of this protocol version") from None
    is_addressed = isinstance(topic, str) and isinstance(event, str)
    if not is_addressed or not all(isinstance(name, str | None) for name in (ref, join_ref)):
        raise BadRequestError("a frame's topic and event are texts, its refs texts or null")
    if not isinstance(payload, dict):
        raise BadRequestError("a frame's payload is an object")
    return Frame(topic, event, payload, ref, join_ref)


def encode(vsn: Vsn, frame: Frame) -> bytes:
    """Write a text frame as a server does: a 1.0.0 frame carries no `join_ref`."""
    if vsn == "2.0.0":
        return orjson.dumps([frame.join_ref, frame.ref, frame.topic, frame.event, frame.payload])
    return orjson.dumps({"ref": frame.ref, "event": frame.event, "payload": frame.payload, "topic": frame.topic})


# -- what a client asks for ------------------------------------------------------------------------------------------


def bindings(join: Frame) -> list[Payload]:
    """The `postgres_changes` entries of a `phx_join`, as they were sent; whatever is no object is left out."""
    config = join.payload.get("config")
    entries = config.get(POSTGRES_CHANGES) if isinstance(config, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


# -- what a server says ----------------------------------------------------------------------------------------------


def reply(request: Frame, response: Payload | None = None, *, status: Status = "ok") -> Frame:
    """The answer to any request: heartbeat, leave, broadcast with `ack`, presence; or a refusal."""
    return Frame(
        request.topic, "phx_reply", {"status": status, "response": response or {}}, request.ref, request.join_ref
    )


def refusal(request: Frame, reason: str) -> Frame:
    """A reply of status `error`; a join's reason reads `<Code>: <text>`."""
    return reply(request, {"reason": reason}, status="error")


def join_reply(join: Frame, ids: Sequence[int]) -> Frame:
    """The answer to a `phx_join`: each binding as it was asked for, in the same order, with its id."""
    assert all(id_ > 0 for id_ in ids), "clients take an id of 0 for none"
    answered = [{**entry, "id": id_} for entry, id_ in zip(bindings(join), ids, strict=True)]
    return reply(join, {POSTGRES_CHANGES: answered})


def system(
    topic: str,
    join_ref: str | None,
    message: str,
    *,
    status: Status = "ok",
    extension: str = POSTGRES_CHANGES,
) -> Frame:
    """News of a channel. Status `error` makes the Python client rejoin after a second."""
    payload = {
        "extension": extension,
        "status": status,
        "message": message,
        "channel": topic.removeprefix(PREFIX),
    }
    return Frame(topic, "system", payload, None, join_ref)


def phx_close(topic: str, join_ref: str | None) -> Frame:
    """The channel has ended; clients do not join it again by themselves."""
    return Frame(topic, "phx_close", {}, join_ref, join_ref)


def phx_error(topic: str, join_ref: str | None) -> Frame:
    """The channel has crashed; clients join it again after a second."""
    return Frame(topic, "phx_error", {}, join_ref, join_ref)


def postgres_changes(topic: str, ids: Sequence[int], data: bytes) -> Frame:
    """A change for the bindings `ids` of a channel; `data` as `change_data` writes it, once for all channels."""
    return Frame(topic, POSTGRES_CHANGES, {"ids": list(ids), "data": orjson.Fragment(data)})


def change_data(
    change: Change, commit_timestamp: str, *, columns: Sequence[str] | None = None, old: Sequence[str] | None = None
) -> bytes:
    """The `data` of a change, as JSON.

    An UPDATE whose source brought no old row has an unchanged key, which is then its `old_record`.

    Args:
        change: what happened.
        commit_timestamp: UTC with milliseconds: `2026-01-02T03:04:05.678Z`.
        columns: the columns to show, in any order; None for all.
        old: the columns to show of the old row, None for the same as `columns`.
    """
    relation = change.relation
    listed = [{"name": c.name, "type": c.type} for c in relation.columns if columns is None or c.name in columns]
    data: dict[str, Any] = {
        "schema": relation.schema,
        "table": relation.table,
        "commit_timestamp": commit_timestamp,
        "type": change.operation,
        "errors": None,
        "columns": listed,
    }
    if change.new is not None:
        data["record"] = orjson.Fragment(encode_image(relation, change.new, columns))
    if change.operation != "INSERT":
        key = [relation.columns[i].name for i in relation.key]
        before, shown = (change.new, key) if change.old is None else (change.old, columns if old is None else old)
        assert before is not None, "a change has an old row or a new one"
        data["old_record"] = orjson.Fragment(encode_image(relation, before, shown))
    return orjson.dumps(data)
