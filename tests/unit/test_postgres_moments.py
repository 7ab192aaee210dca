"""What a snapshot shows, and where the WAL ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.sources.postgres_catalog import Snapshot, end_of_record

PAGE, SEGMENT = 8192, 16 << 20


def test_a_snapshot_shows_what_ended_before_it() -> None:
    snapshot = Snapshot.parse("10:20:12,15")
    assert [xid for xid in range(8, 22) if snapshot.shows(xid)] == [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]
    assert Snapshot.parse("10:10:").shows(9)
    assert not Snapshot.parse("10:10:").shows(10)


@given(st.integers(2**31, 2**50), st.integers(-(2**31) + 1, 2**31 - 1))
def test_short_transaction_ids_are_widened_to_the_nearest(xmax: int, distance: int) -> None:
    snapshot = Snapshot(xmax, xmax, frozenset())
    assert snapshot.shows((xmax + distance) & 0xFFFFFFFF) == (distance < 0)


@pytest.mark.parametrize(
    ("insert", "end"),
    [
        (5 * PAGE + 24, 5 * PAGE),  # only the page's header
        (5 * PAGE + 40, 5 * PAGE + 40),  # the rest of a record that began on the page before
        (SEGMENT + 40, SEGMENT),  # a segment's first page has a longer header
        (5 * PAGE + 100, 5 * PAGE + 100),
        (5 * PAGE, 5 * PAGE),
    ],
)
def test_a_page_header_is_no_record(insert: int, end: int) -> None:
    assert end_of_record(insert, PAGE, SEGMENT) == end
