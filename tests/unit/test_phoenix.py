"""Frames of both protocol versions, and what is said in them."""

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Change, Column, Relation
from realtime_bridge.errors import BadRequestError
from realtime_bridge.wire import phoenix
from realtime_bridge.wire.phoenix import Frame, Vsn

POSTS = Relation(
    "public", "posts", (Column("id", "int8"), Column("title", "text"), Column("at", "timestamptz")), (0,), True
)
TIME = "2026-01-02T03:04:05.678Z"
OLD, NEW = ("1", "a", None), ("1", "b", "2026-01-02 03:04:05+00")

texts = st.text(max_size=20)
refs = st.none() | texts
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
payloads = st.dictionaries(texts, json_values, max_size=4)
frames = st.builds(Frame, texts, texts, payloads, refs, refs)


def spoken(vsn: Vsn, frame: Frame) -> Any:
    return orjson.loads(phoenix.encode(vsn, frame))


@given(frames)
def test_a_frame_of_the_second_version_comes_back_as_it_was(frame: Frame) -> None:
    assert phoenix.decode("2.0.0", phoenix.encode("2.0.0", frame)) == frame


@given(frames)
def test_a_frame_of_the_first_version_comes_back_without_its_join_ref(frame: Frame) -> None:
    expected = Frame(frame.topic, frame.event, frame.payload, frame.ref, None)
    assert phoenix.decode("1.0.0", phoenix.encode("1.0.0", frame)) == expected


@given(st.sampled_from(["1.0.0", "2.0.0"]), st.binary(max_size=40) | json_values.map(orjson.dumps))
def test_whatever_arrives_is_a_frame_or_a_bad_request(vsn: Vsn, data: bytes) -> None:
    with suppress(BadRequestError):
        assert isinstance(phoenix.decode(vsn, data), Frame)


def test_a_client_of_the_first_version_may_send_a_join_ref() -> None:
    sent = '{"topic":"realtime:r","event":"phx_join","payload":{},"ref":"6","join_ref":"6"}'
    assert phoenix.decode("1.0.0", sent) == Frame("realtime:r", "phx_join", {}, "6", "6")


def test_elements_behind_the_fifth_are_ignored() -> None:
    assert phoenix.decode("2.0.0", '[null,"8","phoenix","heartbeat",{},1]') == Frame("phoenix", "heartbeat", {}, "8")


@pytest.mark.parametrize(
    ("vsn", "data"),
    [
        ("1.0.0", '{"topic":"t","event":"e","payload":{}}'),  # no ref
        ("1.0.0", '["1","1","t","e",{}]'),
        ("1.0.0", '{"topic":"t","event":"e","payload":null,"ref":null}'),
        ("2.0.0", '["1","1","t","e"]'),
        ("2.0.0", '["1",1,"t","e",{}]'),
        ("2.0.0", '["1","1",null,"e",{}]'),
        ("2.0.0", '"abcde"'),
        ("2.0.0", "{"),
        ("2.0.0", b"\xff"),
    ],
)
def test_what_is_no_frame_of_the_version_is_refused(vsn: Vsn, data: str | bytes) -> None:
    with pytest.raises(BadRequestError):
        phoenix.decode(vsn, data)


def test_a_version_left_out_is_the_first_and_others_are_refused() -> None:
    assert [phoenix.parse_vsn(text) for text in (None, "1.0.0", "2.0.0")] == ["1.0.0", "1.0.0", "2.0.0"]
    for text in ("", "3.0.0", "2"):
        with pytest.raises(BadRequestError):
            phoenix.parse_vsn(text)


def test_a_heartbeat_is_answered_with_its_ref_in_both_versions() -> None:
    answer = phoenix.reply(Frame("phoenix", "heartbeat", {}, "8"))
    assert spoken("2.0.0", answer) == [None, "8", "phoenix", "phx_reply", {"status": "ok", "response": {}}]
    unnamed = phoenix.reply(Frame("phoenix", "heartbeat"))
    assert spoken("1.0.0", unnamed) == {
        "ref": None,
        "event": "phx_reply",
        "payload": {"status": "ok", "response": {}},
        "topic": "phoenix",
    }


def test_a_join_reply_repeats_every_binding_in_order_with_its_id() -> None:
    wanted: list[dict[str, Any]] = [
        {"event": "*", "schema": "public", "table": "todos"},
        {"event": "INSERT", "schema": "public", "table": "todos", "filter": "id=gt.0", "select": ["id"]},
    ]
    join = Frame("realtime:room", "phx_join", {"config": {"postgres_changes": [wanted[0], None, wanted[1]]}}, "6", "6")
    payload = {"status": "ok", "response": {"postgres_changes": [{**wanted[0], "id": 7}, {**wanted[1], "id": 9}]}}
    assert spoken("2.0.0", phoenix.join_reply(join, [7, 9])) == ["6", "6", "realtime:room", "phx_reply", payload]


@pytest.mark.parametrize("payload", [{}, {"config": None}, {"config": {"postgres_changes": None}}, {"config": []}])
def test_a_join_without_bindings_is_answered_with_an_empty_list(payload: dict[str, Any]) -> None:
    join = Frame("realtime:room", "phx_join", payload, "6", "6")
    assert phoenix.bindings(join) == []
    assert phoenix.join_reply(join, []).payload["response"] == {"postgres_changes": []}


def test_a_refusal_tells_its_reason() -> None:
    join = Frame("realtime:room", "phx_join", {}, "6", "6")
    payload = {"status": "error", "response": {"reason": "Unauthorized: no"}}
    assert spoken("2.0.0", phoenix.refusal(join, "Unauthorized: no")) == [
        "6",
        "6",
        "realtime:room",
        "phx_reply",
        payload,
    ]


def test_a_system_message_names_the_channel_without_its_prefix() -> None:
    frame = phoenix.system("realtime:room", "6", phoenix.SUBSCRIBED)
    payload = {
        "extension": "postgres_changes",
        "status": "ok",
        "message": "Subscribed to PostgreSQL",
        "channel": "room",
    }
    assert spoken("2.0.0", frame) == ["6", None, "realtime:room", "system", payload]
    assert spoken("1.0.0", frame) == {"ref": None, "event": "system", "payload": payload, "topic": "realtime:room"}


def test_a_close_and_an_error_carry_the_ref_of_the_join_twice() -> None:
    assert spoken("2.0.0", phoenix.phx_close("realtime:room", "6")) == ["6", "6", "realtime:room", "phx_close", {}]
    assert spoken("2.0.0", phoenix.phx_error("realtime:room", "6")) == ["6", "6", "realtime:room", "phx_error", {}]


def test_a_change_is_for_everybody_and_so_without_refs() -> None:
    change = Change("INSERT", POSTS, None, NEW, 0)
    frame = phoenix.postgres_changes("realtime:room", [7], phoenix.change_data(change, TIME))
    data = {
        "schema": "public",
        "table": "posts",
        "commit_timestamp": TIME,
        "type": "INSERT",
        "errors": None,
        "columns": [
            {"name": "id", "type": "int8"},
            {"name": "title", "type": "text"},
            {"name": "at", "type": "timestamptz"},
        ],
        "record": {"id": 1, "title": "b", "at": "2026-01-02T03:04:05+00:00"},
    }
    assert spoken("2.0.0", frame) == [None, None, "realtime:room", "postgres_changes", {"ids": [7], "data": data}]
    assert spoken("1.0.0", frame)["payload"] == {"ids": [7], "data": data}


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (
            Change("UPDATE", POSTS, OLD, ("1", "b", ABSENT), 0),
            {"record": {"id": 1, "title": "b"}, "old_record": {"id": 1, "title": "a", "at": None}},
        ),
        (
            Change("UPDATE", POSTS, None, ("1", "b", None), 0),
            {"record": {"id": 1, "title": "b", "at": None}, "old_record": {"id": 1}},
        ),
        (Change("DELETE", POSTS, OLD, None, 0), {"old_record": {"id": 1, "title": "a", "at": None}}),
    ],
)
def test_each_operation_brings_the_rows_it_has(change: Change, rows: dict[str, Any]) -> None:
    data = orjson.loads(phoenix.change_data(change, TIME))
    assert {name: data[name] for name in ("record", "old_record") if name in data} == rows


def test_columns_are_shown_as_asked_and_the_old_row_by_its_own_list() -> None:
    data = orjson.loads(
        phoenix.change_data(Change("UPDATE", POSTS, OLD, NEW, 0), TIME, columns=["id", "title"], old=["id"])
    )
    assert data["columns"] == [{"name": "id", "type": "int8"}, {"name": "title", "type": "text"}]
    assert (data["record"], data["old_record"]) == ({"id": 1, "title": "b"}, {"id": 1})
    same = orjson.loads(phoenix.change_data(Change("DELETE", POSTS, OLD, None, 0), TIME, columns=["id"]))
    assert same["old_record"] == {"id": 1}
