"""`tail` without a bridge: addresses, tokens, losses and waits, and what a line looks like."""

import io
import re
from decimal import Decimal
from typing import Any

import orjson
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.frames import Close
from websockets.http11 import Response

from realtime_bridge.cli.tail import (
    Loss,
    Message,
    backoff,
    closed,
    is_for_programs,
    not_opened,
    parse,
    read_token,
    render,
    socket_address,
)
from realtime_bridge.errors import ConfigurationError

INSERT = {
    "type": "INSERT",
    "schema": "public",
    "table": "posts",
    "record": {"id": 1, "title": "hello"},
    "commit_timestamp": "2026-01-02T03:04:05.678Z",
    "position": "k3f9x2-42",
}


def line(message: Message) -> str:
    rendered = render(b"", message)
    assert rendered is not None
    return rendered.plain


# -- what it was called with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", "ws://127.0.0.1:8000/ws"),
        ("https://api.example.com/", "wss://api.example.com/ws"),
        ("wss://api.example.com/ws", "wss://api.example.com/ws"),
        ("https://example.com/live/", "wss://example.com/live/ws"),
        ("ws://[::1]:8000", "ws://[::1]:8000/ws"),
    ],
)
def test_a_bridge_may_be_named_by_any_of_its_addresses(url: str, address: str) -> None:
    assert socket_address(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "localhost:8000",
        "ftp://example.com",
        "http://",
        "http://[",
        "http://example.com:port",
        "http://example.com?token=secret",
        "http://user:secret@example.com",
        "http://example.com#secret",
    ],
)
def test_an_address_that_is_none_or_holds_more_is_bad_usage_and_not_repeated(url: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        socket_address(url)
    assert "secret" not in str(caught.value)


def test_a_token_comes_from_standard_input_for_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc.def.ghi\nmore\n"))
    assert read_token("-") == "abc.def.ghi"
    assert read_token(" abc ") == "abc"


def test_without_a_token_there_is_nothing_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for given_ in (None, "", " ", "-"):
        with pytest.raises(ConfigurationError, match="REALTIME_BRIDGE_TOKEN"):
            read_token(given_)


@pytest.mark.parametrize("text", ["two words", "one\r\nCookie: two", "größe"])
def test_what_cannot_stand_in_a_header_is_no_token_and_not_repeated(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        read_token(text)
    assert text not in str(caught.value)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "final", "seconds"),
    [
        (4401, "token refused: expired", True, None),
        (4400, "filter: needs exactly one table", True, None),
        (4403, "origin not allowed", True, None),
        (4413, "too large", True, None),
        (1007, "", True, None),
        (1009, "", True, None),
        (1012, "retry in 1500 ms", False, 1.5),
        (1001, "retry in 20 ms", False, 0.02),
        (1012, "retry in 999999999 ms", False, 30.0),
        (1012, "soon", False, None),
        (4429, "retry in 20 ms", False, None),
        (1000, "", False, None),
        (1011, "internal error", False, None),
        (1013, "starting", False, None),
        (4408, "no sign of life", False, None),
        (4999, "new in a later version", False, None),
    ],
)
def test_close_codes_are_obeyed(code: int, reason: str, final: bool, seconds: float | None) -> None:
    loss = closed(Close(code, reason))
    assert (loss.final, loss.retry_seconds) == (final, seconds)
    assert (reason or str(code)) in loss.reason


def test_another_token_is_asked_for_in_words() -> None:
    assert closed(Close(4401, "token expired")).reason == "the bridge asks for another token: token expired"


def test_a_connection_that_ends_without_a_word_is_made_again() -> None:
    assert closed(None) == Loss("the connection was lost")


def test_a_reason_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in closed(Close(4400, "\x1b[2J")).reason


@pytest.mark.parametrize(
    ("status", "final"), [(301, True), (401, True), (403, True), (404, True), (429, False), (502, False), (503, False)]
)
def test_what_answers_in_place_of_a_bridge_is_told_and_asked_again_if_it_may_get_better(
    status: int, final: bool
) -> None:
    loss = not_opened(InvalidStatus(Response(status, "", Headers())))
    assert (loss.final, f"HTTP status {status}" in loss.reason) == (final, True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "no connection: Connection refused"),
        (TimeoutError("timed out"), "no connection: timed out"),
        (
            InvalidMessage("did not receive a valid HTTP response"),
            "no connection: did not receive a valid HTTP response",
        ),
        (OSError(), "no connection: OSError"),
    ],
)
def test_a_bridge_that_cannot_be_reached_is_tried_again(error: OSError | InvalidMessage, reason: str) -> None:
    assert not_opened(error) == Loss(reason)


@given(st.integers(min_value=0, max_value=10**6))
def test_waits_grow_and_stay_bounded(failures: int) -> None:
    assert 0 <= backoff(failures) <= min(0.5 * 2 ** min(failures, 30), 30)


# -- for programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["INSERT", "UPDATE", "DELETE", "resync"])
def test_changes_and_resyncs_are_for_programs(kind: str) -> None:
    assert is_for_programs({"type": kind})


@pytest.mark.parametrize("kind", ["ready", "ping", "pong", "error", "auth_expiring", "subscribed", "later"])
def test_what_concerns_the_connection_alone_is_not(kind: str) -> None:
    assert not is_for_programs({"type": kind})


@pytest.mark.parametrize("raw", [b"", b"[1]", b"null", b"\xff", b'{"type":', b"[" * 100_000, b"1" * 5_000])
def test_what_cannot_be_read_is_handed_on(raw: bytes) -> None:
    message = parse(raw)
    assert message == {}
    assert is_for_programs(message)
    assert render(raw, message) is not None


# -- for people --------------------------------------------------------------------------------------------------------


def test_an_insert_shows_its_row() -> None:
    assert line(INSERT) == '03:04:05.678Z INSERT public.posts id=1 title="hello"'


def test_an_update_shows_what_it_changed() -> None:
    update = {**INSERT, "type": "UPDATE", "old_record": {"id": 1, "title": "hello"}, "record": {"id": 1, "title": None}}
    assert line(update) == '03:04:05.678Z UPDATE public.posts id=1 title="hello" → null'


def test_an_update_of_which_only_the_key_was_known_shows_the_row() -> None:
    assert line({**INSERT, "type": "UPDATE", "old_record": {"id": 1}}).endswith(
        'UPDATE public.posts id=1 title="hello"'
    )


def test_a_row_that_left_and_a_row_that_was_read_back_are_told() -> None:
    left = {**INSERT, "type": "DELETE", "old_record": {"id": 1}, "record": None, "left": True}
    assert line(left) == "03:04:05.678Z DELETE public.posts id=1 has left what this user sees"
    assert line({**INSERT, "repaired": True}).endswith(" was read back after a gap")


def test_numbers_keep_their_digits() -> None:
    raw = (
        b'{"type":"INSERT","record":{"exact":1234567890.123456789012345678,"big":9007199254740993,"doc":{"a":[1.5,2]}}}'
    )
    message = parse(raw)
    assert message["record"]["exact"] == Decimal("1234567890.123456789012345678")
    assert line(message).endswith(' exact=1234567890.123456789012345678 big=9007199254740993 doc={"a": [1.5, 2]}')


def test_a_long_value_is_cut() -> None:
    shown = line({**INSERT, "record": {"body": "x" * 10_000, "id": 2}})
    assert len(shown) < 200
    assert "…" in shown
    assert shown.endswith(" id=2")


def test_a_value_nested_beyond_reason_is_not_shown() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    rendered = render(b"", {**INSERT, "record": {"deep": value}})
    assert rendered is not None
    assert rendered.plain.endswith(" deep=…")
    while value:  # or taking it apart would nest as deep
        value = value.pop()


def test_ready_and_resync_are_dim_and_pings_are_hidden() -> None:
    ready = render(b"", {"type": "ready", "position": "k-1", "tables": ["public.posts", "public.notes"]})
    resync = render(b"", {"type": "resync", "table": "*", "reason": "history_gone", "position": "k-2"})
    assert ready is not None
    assert resync is not None
    assert (ready.plain, ready.style) == ("ready at k-1: public.posts, public.notes", "dim")
    assert (resync.plain, resync.style) == ("resync * at k-2: history_gone", "dim")
    assert render(b"", {"type": "ping", "position": "k-3"}) is None


HOSTILE = st.text(st.sampled_from("\x00\x07\b\t\n\r\x1b\x7f\x85\x9b\u2028\u202e\u200b\ufeff[]0;m\\\"'é😀"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.dictionaries(st.text() | HOSTILE, VALUES, max_size=4)


@given(
    st.sampled_from(["INSERT", "UPDATE", "DELETE", "ready", "resync", "later"]), HOSTILE, ROWS, ROWS, st.lists(HOSTILE)
)
def test_no_row_can_write_to_the_terminal_what_is_not_a_colour(
    kind: str, text: str, old: dict[str, Any], new: dict[str, Any], tables: list[str]
) -> None:
    message = {
        **dict.fromkeys(("schema", "table", "reason", "commit_timestamp", "position"), text),
        "type": kind,
        "old_record": old,
        "record": new,
        "tables": tables,
    }
    rendered = render(orjson.dumps(message), message)
    assert rendered is not None
    terminal = io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="truecolor", soft_wrap=True).print(rendered)
    written, end = terminal.getvalue()[:-1], terminal.getvalue()[-1:]
    assert end == "\n"
    assert re.sub(r"\x1b\[[0-9;]*m", "", written).isprintable()
