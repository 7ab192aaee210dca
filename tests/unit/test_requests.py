import pytest
from starlette.requests import HTTPConnection

from realtime_bridge.transports.requests import accepts_events, origin_allowed

APP = "https://app.example.com"


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "expected"),
    [
        (None, "api.example.com", (), True),
        ("https://api.example.com", "api.example.com", (), True),
        ("https://API.example.com", "Api.Example.com", (), True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", (), True),
        ("http://127.0.0.1:8001", "127.0.0.1:8000", (), False),
        (APP, "api.example.com", (), False),
        (APP, "api.example.com", (APP,), True),
        (APP, "api.example.com", ("https://APP.example.com/",), True),
        ("http://app.example.com", "api.example.com", (APP,), False),
        ("https://app.example.com.evil.example", "api.example.com", (APP,), False),
        ("https://api.example.com", "api.example.com", (APP,), True),
        ("https://evil.example", "api.example.com", ("*",), True),
        ("null", "api.example.com", (APP,), False),
        ("null", "", (), False),
        ("", "", (), False),
        ("", None, (), False),
        ("http://[", "api.example.com", (), False),
    ],
)
def test_a_page_may_come_from_the_same_host_or_from_an_origin_that_is_named(
    origin: str | None, host: str | None, allowed: tuple[str, ...], expected: bool
) -> None:
    assert origin_allowed(origin, host, allowed) is expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (["text/event-stream"], True),
        (["Text/Event-Stream"], True),
        (["application/json, text/event-stream;charset=utf-8; q=0.1"], True),
        (["application/json", "text/event-stream"], True),
        (["text/event-stream;q=0.001"], True),
        (["application/json, text/event-stream;q=0"], False),
        (["text/event-stream; charset=utf-8; Q=0.000, */*"], False),
        (["text/event-streams"], False),
        (["application/json;profile=text/event-stream"], False),
        (["*/*"], False),
        (["text/*"], False),
        ([""], False),
        ([], False),
    ],
)
def test_events_are_streamed_to_whoever_accepts_them_by_name(accept: list[str], expected: bool) -> None:
    headers = [(b"accept", one.encode()) for one in accept]
    assert accepts_events(HTTPConnection({"type": "http", "headers": headers})) is expected
