"""The frames are RFC 6455's: websockets' own client, which knows nothing of ours, must agree with every byte."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from realtime_bridge.wire.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    FrameError,
    FrameParser,
    clip_reason,
    close_frame,
    ping_frame,
    pong_frame,
    text_frame,
)

type_and_payload = tuple[int, str | bytes]
mask = b"\x01\x02\x03\x04"

control_payloads = st.binary(max_size=125)
texts = st.text(max_size=300).map(str.encode)
sendable_codes = st.sampled_from([1000, 1001, 1003, 1007, 1012, 1013, 3000, 4400, 4999])


def client() -> ClientProtocol:
    return ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)


def sent(protocol: ClientProtocol) -> bytes:
    return b"".join(protocol.data_to_send())


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, fin=fin).serialize(mask=True)


def raw(first: int, second: int, rest: bytes = b"") -> bytes:
    return bytes((first, second)) + rest


def parse(data: bytes, parser: FrameParser | None = None) -> list[type_and_payload]:
    return list((parser or FrameParser()).feed(data))


def parse_cut(data: bytes, cuts: Iterable[int]) -> tuple[list[type_and_payload], int | None]:
    """Feed `data` cut at those places; the messages, and the code of the error that ended them."""
    parser, messages = FrameParser(), list[type_and_payload]()
    edges = [0, *sorted(cuts), len(data)]
    try:
        for start, end in pairwise(edges):
            for message in parser.feed(data[start:end]):
                messages.append(message)
    except FrameError as error:
        return messages, error.code
    return messages, None


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[type_and_payload]]:
    """What a client may send, fragmented, with control frames in between, and the messages that it means."""
    protocol, messages = client(), list[type_and_payload]()

    def maybe_control() -> None:
        payload = draw(control_payloads)
        match draw(st.sampled_from(["nothing", "ping", "pong"])):
            case "ping":
                protocol.send_ping(payload)
                messages.append((PING, payload))
            case "pong":
                protocol.send_pong(payload)
                messages.append((PONG, payload))

    for opcode in draw(st.lists(st.sampled_from([TEXT, BINARY]), max_size=4)):
        pieces = draw(st.lists(texts, min_size=1, max_size=4))
        send = protocol.send_text if opcode == TEXT else protocol.send_binary
        for number, piece in enumerate(pieces):
            fin = number == len(pieces) - 1
            if number:
                protocol.send_continuation(piece, fin)
            else:
                send(piece, fin)
            if not fin:
                maybe_control()
        whole = b"".join(pieces)
        messages.append((opcode, whole.decode() if opcode == TEXT else whole))
        maybe_control()
    if draw(st.booleans()):
        code = draw(sendable_codes)
        protocol.send_close(code, "bye")
        messages.append((CLOSE, code.to_bytes(2, "big") + b"bye"))
    return sent(protocol), messages


@given(conversations(), st.data())
def test_any_cutting_of_the_bytes_gives_the_same_messages(
    conversation: tuple[bytes, list[type_and_payload]], data: st.DataObject
) -> None:
    sent_bytes, messages = conversation
    cuts = data.draw(st.lists(st.integers(0, len(sent_bytes)), max_size=8))
    assert parse_cut(sent_bytes, cuts) == (messages, None)
    assert parse_cut(sent_bytes, range(len(sent_bytes))) == (messages, None)


@given(st.binary(max_size=200), st.data())
def test_any_bytes_end_in_the_same_way_however_they_are_cut(noise: bytes, data: st.DataObject) -> None:
    stream = masked(TEXT, b"before") + noise
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert parse_cut(stream, cuts) == parse_cut(stream, [])


@given(st.binary(max_size=60), st.integers(0, 255), st.sampled_from([0, 1, 5, 125]))
def test_a_frame_is_refused_where_websockets_refuses_it(payload: bytes, first: int, size: int) -> None:
    stream = raw(first, 0x80 | size, mask + payload.ljust(size, b"\0")[:size])
    _, code = parse_cut(stream, [])
    judge = ServerProtocol(state=State.OPEN)
    judge.receive_data(stream)
    if judge.parser_exc is None:
        # websockets leaves UTF-8 to the caller
        assert code in (None, 1007)
    else:
        assert judge.close_sent is not None
        both = {1002} if first & 0x0F == CLOSE else set()  # the code and the text of a close frame can be wrong at once
        assert code in {judge.close_sent.code, *both}


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
def test_a_text_frame_of_any_length_is_read_by_websockets(size: int) -> None:
    protocol = client()
    protocol.receive_data(text_frame(b"x" * size))
    (frame,) = protocol.events_received()
    assert frame == Frame(Opcode.TEXT, b"x" * size)


@given(control_payloads)
def test_pings_and_pongs_are_read_by_websockets(payload: bytes) -> None:
    protocol = client()
    protocol.receive_data(ping_frame(payload) + pong_frame(payload))
    assert protocol.events_received() == [Frame(Opcode.PING, payload), Frame(Opcode.PONG, payload)]


@given(sendable_codes, st.text(max_size=200))
def test_a_close_frame_is_read_by_websockets(code: int, reason: str) -> None:
    protocol = client()
    protocol.receive_data(close_frame(code, reason))
    assert protocol.close_rcvd is not None
    assert (protocol.close_rcvd.code, protocol.close_rcvd.reason) == (code, clip_reason(reason))


@given(st.text(max_size=200))
def test_a_clipped_reason_fits_and_is_the_beginning_of_the_whole(reason: str) -> None:
    clipped = clip_reason(reason)
    assert reason.startswith(clipped)
    assert len(clipped.encode()) <= 123
    assert clipped == reason or len(clipped.encode()) > 119


FORBIDDEN = {
    "not masked": (raw(0x81, 0x01, b"x"), 1002),
    "RSV1, as deflate sets it": (raw(0xC1, 0x81, mask + b"x"), 1002),
    "RSV2": (raw(0xA1, 0x81, mask + b"x"), 1002),
    "RSV3": (raw(0x91, 0x81, mask + b"x"), 1002),
    "reserved data opcode": (raw(0x83, 0x80, mask), 1002),
    "reserved control opcode": (raw(0x8B, 0x80, mask), 1002),
    "fragmented ping": (raw(0x09, 0x80, mask), 1002),
    "long ping": (raw(0x89, 0xFE, b"\x00\x7e" + mask), 1002),
    "continuation of nothing": (masked(CONTINUATION, b"x"), 1002),
    "new message within a message": (masked(TEXT, b"x", fin=False) + masked(TEXT, b"y"), 1002),
    "16-bit length that fits 7": (raw(0x81, 0xFE, b"\x00\x7d" + mask), 1002),
    "64-bit length that fits 16": (raw(0x81, 0xFF, (65_535).to_bytes(8, "big") + mask), 1002),
    "64-bit length with the highest bit": (raw(0x81, 0xFF, b"\x80" + bytes(7) + mask), 1002),
    "close with one byte": (masked(CLOSE, b"\x03"), 1002),
    "close with a code that is never sent": (masked(CLOSE, (1005).to_bytes(2, "big")), 1002),
    "close with a code under 1000": (masked(CLOSE, (999).to_bytes(2, "big")), 1002),
    "close with a code over 4999": (masked(CLOSE, (5000).to_bytes(2, "big")), 1002),
    "close with a reason that is not UTF-8": (masked(CLOSE, b"\x03\xe8\xff"), 1007),
    "text that is not UTF-8": (masked(TEXT, b"\xff"), 1007),
    "text cut within a character": (masked(TEXT, "é".encode()[:1]), 1007),
    "a surrogate as UTF-8": (masked(TEXT, b"\xed\xa0\x80"), 1007),
}


@pytest.mark.parametrize(("stream", "code"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_the_rfc_forbids_is_refused_with_its_code(stream: bytes, code: int) -> None:
    with pytest.raises(FrameError) as refused:
        parse(stream)
    assert refused.value.code == code


def test_a_character_may_be_spread_over_fragments() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert parse(masked(TEXT, first, fin=False) + masked(CONTINUATION, second)) == [(TEXT, "é")]


def test_empty_fragments_make_an_empty_message() -> None:
    stream = masked(TEXT, fin=False) + masked(CONTINUATION, fin=False) + masked(CONTINUATION)
    assert parse(stream) == [(TEXT, "")]


def test_a_message_of_exactly_the_limit_is_taken_and_one_byte_more_is_refused() -> None:
    assert parse(masked(TEXT, b"x" * 10), FrameParser(10)) == [(TEXT, "x" * 10)]
    with pytest.raises(FrameError) as refused:
        parse(masked(TEXT, b"x" * 11), FrameParser(10))
    assert refused.value.code == 4413


def test_an_oversize_message_is_refused_by_its_header_alone() -> None:
    with pytest.raises(FrameError, match="over 65536 bytes"):
        parse(raw(0x81, 0xFF, (1 << 40).to_bytes(8, "big")))


def test_fragments_count_together_towards_the_limit() -> None:
    parser = FrameParser(10)
    assert parse(masked(TEXT, b"x" * 6, fin=False), parser) == []
    with pytest.raises(FrameError) as refused:
        parse(masked(CONTINUATION, b"x" * 5), parser)
    assert refused.value.code == 4413


def test_messages_before_an_error_are_still_given() -> None:
    assert parse_cut(masked(TEXT, b"first") + raw(0x81, 0x01, b"x"), []) == ([(TEXT, "first")], 1002)


def test_an_idle_parser_holds_no_buffer() -> None:
    parser = FrameParser()
    stream = masked(TEXT, b"x" * 1000, fin=False) + masked(CONTINUATION, b"y" * 1000)
    for byte in stream:
        parse(bytes([byte]), parser)
    assert (parser._pending, parser._fragments) == (None, None)
