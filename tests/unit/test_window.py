"""The window: a bounded run without holes."""

from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import Control, Entry
from realtime_bridge.hub.base import Encoding
from realtime_bridge.hub.window import Window, wrap


def entries(first: int, count: int, size: int = 10) -> list[Entry]:
    control = Control("resync", "public.posts", "bulk")
    return [Entry(n, f"id{n}", f"id{n - 1}", control, size) for n in range(first, first + count)]


def numbers(window: Window, after: int, limit: int = 1000) -> list[int] | None:
    items = window.after(after, limit)
    return None if items is None else [item.entry.number for item in items]


def test_the_oldest_leave_when_there_are_too_many() -> None:
    window = Window(size=3, max_bytes=1000)
    window.extend(entries(1, 5))
    assert (window.first, window.last) == (3, 5)
    assert numbers(window, 2) == [3, 4, 5]
    assert numbers(window, 1) is None
    assert numbers(window, 5) == []


def test_the_oldest_leave_when_they_are_too_large() -> None:
    window = Window(size=100, max_bytes=35)
    window.extend(entries(1, 5))
    assert numbers(window, 2) == [3, 4, 5]


def test_a_cut_forgets_the_newest() -> None:
    window = Window(size=100, max_bytes=10_000)
    window.extend(entries(1, 5))
    window.cut(3)
    assert window.last_id() == "id3"
    window.extend(entries(4, 1))
    assert numbers(window, 0) == [1, 2, 3, 4]
    window.cut(0)
    assert (window.first, window.last, window.last_id()) == (1, 0, None)


def test_a_cut_before_the_window_empties_it() -> None:
    window = Window(size=2, max_bytes=10_000)
    window.extend(entries(1, 5))
    window.cut(1)
    assert (window.first, window.last) == (2, 1)


@given(st.lists(st.integers(1, 7), max_size=12), st.integers(1, 10), st.integers(0, 60), st.integers(1, 9))
def test_what_follows_a_number_is_whole_or_refused(batches: list[int], size: int, after: int, limit: int) -> None:
    window = Window(size=size, max_bytes=10**9)
    for count in batches:
        window.extend(entries(window.last + 1, count))
    found = numbers(window, after, limit)
    if after < window.first - 1:
        assert found is None
    else:
        assert found == list(range(after + 1, window.last + 1))[:limit]


def test_an_event_carries_its_position_as_id() -> None:
    assert wrap(Encoding.EVENT, b"{}", "abcd-7") == b"id: abcd-7\ndata: {}\n\n"
    assert wrap(Encoding.EVENT, b"{}", "") == b"data: {}\n\n"
    assert wrap(Encoding.JSON, b"{}", "abcd-7") == b"{}"
    assert wrap(Encoding.FRAME, b"{}", "abcd-7") == b"\x81\x02{}"
