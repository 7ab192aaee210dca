"""The words of a change, and the form in which the history keeps them."""

import contextlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import (
    ABSENT,
    Change,
    Column,
    Control,
    Image,
    Position,
    Relation,
    decode_body,
    encode_body,
    relation_version,
)
from realtime_bridge.errors import InvalidPositionError

POSTS = Relation("public", "posts", (Column("id", "int8"), Column("title", "text"), Column("body", "text")), (0,), True)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
IMAGE = st.tuples(*[st.one_of(TEXT, st.none(), st.just(ABSENT))] * 3)


@given(
    st.sampled_from(["INSERT", "UPDATE", "DELETE"]),
    st.one_of(st.none(), IMAGE),
    st.one_of(st.none(), IMAGE),
    st.integers(0, 2**60),
    st.booleans(),
)
def test_a_change_comes_back_as_it_was(
    operation: str, old: Image | None, new: Image | None, time: int, repaired: bool
) -> None:
    change = Change(operation, POSTS, old, new, time, "0/1A", repaired)  # type: ignore[arg-type]
    data = encode_body(change)
    assert relation_version(data) == POSTS.version
    assert decode_body(data, {POSTS.version: POSTS}) == change


@pytest.mark.parametrize(
    "control",
    [Control("catalog", "public.members", None, 5, "x"), Control("resync", "*", "upstream_gap", 5, since=4)],
)
def test_a_control_comes_back_as_it_was(control: Control) -> None:
    data = encode_body(control)
    assert relation_version(data) is None
    assert decode_body(data, {}) == control


def test_a_relation_comes_back_as_it_was_and_keeps_its_version() -> None:
    again = Relation.decode(POSTS.encoded)
    assert again == POSTS
    assert again.version == POSTS.version
    assert Relation("public", "posts", POSTS.columns, (0,), False).version != POSTS.version


def test_an_entry_of_the_first_version_is_read_and_written_still() -> None:
    data = b'[1,"DELETE","%b",["1",false,null],null,5,"x"]' % POSTS.version.encode()
    change = Change("DELETE", POSTS, ("1", ABSENT, None), None, 5, "x")
    assert decode_body(data, {POSTS.version: POSTS}) == change
    assert encode_body(change) == data


def test_an_entry_of_a_later_version_is_refused() -> None:
    fields = orjson.loads(encode_body(Control("resync", "*", "bulk")))
    later = orjson.dumps([99, *fields[1:]])
    with pytest.raises(ValueError, match="format 99"):
        decode_body(later, {})
    with pytest.raises(ValueError, match="format 99"):
        relation_version(later)


def test_an_unknown_relation_is_named() -> None:
    data = encode_body(Change("DELETE", POSTS, ("1", "a", "b"), None, 0))
    with pytest.raises(KeyError, match=POSTS.version):
        decode_body(data, {})


@given(st.from_regex(r"[a-z0-9]{4,32}", fullmatch=True), st.integers(0, 10**18 - 2), st.integers(0, 1000))
def test_a_position_comes_back_as_it_was(epoch: str, number: int, further: int) -> None:
    position = Position(epoch, number, min(number + further, 10**18 - 1) if further else 0)
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "abcd",
        "abcd-",
        "abcd--1",
        "abcd-01",
        "ABCD-1",
        "abcd-1 ",
        "a-b-1",
        "abcd-9" * 9,
        "abcd-2-03",
    ],
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(InvalidPositionError):
        Position.parse(text)


@given(st.text())
def test_any_text_is_a_position_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidPositionError):
        assert str(Position.parse(text)) == text
