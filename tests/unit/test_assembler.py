"""Transactions that come in blocks: held with bounded memory, and told as if they had come whole after their commit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.pgoutput import PgoutputError, Truncate
from realtime_bridge.sources.assembler import Assembler
from realtime_bridge.sources.transactions import Place, Transaction
from tests.pgoutputs import (
    DESCRIPTIONS,
    NOTES,
    POSTS,
    STREAM_STOP,
    begin,
    commit,
    insert,
    relation,
    stream_abort,
    stream_commit,
    stream_start,
    truncate,
    within,
)

START = Place(0, 0)
A, B = 1000, 2000
POSTS_DESCRIBED, NOTES_DESCRIBED = DESCRIPTIONS


def assembled(
    messages: Iterable[bytes],
    *,
    after: Place = START,
    rows: int = 100,
    size: int = 10**6,
    references: Sequence[str] = (),
) -> Assembler:
    assembler = Assembler(
        ["public.posts"],
        after=after,
        transaction_rows=rows,
        transaction_bytes=size,
        references=lambda: references,
    )
    for message in messages:
        assembler.feed(message)
    return assembler


def block(xid: int, *messages: bytes, first: bool = True, subxid: int | None = None) -> list[bytes]:
    """A block of messages, all written by one (sub)transaction: the whole one's, if no other is named."""
    writer = xid if subxid is None else subxid
    return [stream_start(xid, first=first), *(within(writer, message) for message in messages), STREAM_STOP]


def rows(transaction: Transaction) -> list[tuple[int, str]]:
    """Ordinal and key of every row; `*` for a truncate."""
    found = []
    for row in transaction.rows:
        assert row.size > 0
        if isinstance(row.message, Truncate):
            found.append((row.ordinal, "*"))
        else:
            found.append((row.ordinal, str(getattr(row.message, "new", ("?",))[0])))
    return found


def told(assembler: Assembler) -> list[tuple[int, int, object]]:
    """What is ready, in order: where and under which id it was committed, and its rows or the tables of a bulk one."""
    found: list[tuple[int, int, object]] = []
    while assembler.ready:
        transaction = assembler.take()
        what: object = set(transaction.tables) if transaction.bulk else rows(transaction)
        found.append((transaction.commit_lsn, transaction.xid, what))
    assert (assembler.ready_rows, assembler.ready_bytes) == (0, 0)
    return found


# -- what is told, and when ------------------------------------------------------------------------------------------


def test_nothing_is_told_before_the_commit_nor_does_it_hold_others_up() -> None:
    assembler = assembled(block(A, POSTS_DESCRIBED, insert("1")))
    assembler.keepalive(500)
    assert not assembler.ready
    assert assembler.reached == 500
    for message in (begin(600), POSTS_DESCRIBED, insert("2"), commit(600), *block(A, insert("3"), first=False)):
        assembler.feed(message)
    assembler.feed(stream_commit(A, 700))
    assert told(assembler) == [(600, 1, [(1, "2")]), (700, A, [(1, "1"), (2, "3")])]
    assert assembler.reached == 710


def test_a_keepalive_within_a_block_proves_nothing() -> None:
    assembler = assembled([stream_start(A)])
    assembler.keepalive(500)
    assert assembler.reached == 0
    assembler.feed(STREAM_STOP)
    assembler.keepalive(500)
    assert assembler.reached == 500


def test_interleaved_transactions_are_told_in_the_order_of_their_commits() -> None:
    messages = [
        *block(A, POSTS_DESCRIBED, insert("a1")),
        *block(B, POSTS_DESCRIBED, insert("b1")),
        *block(A, insert("a2"), first=False),
        *block(B, insert("b2"), first=False),
        stream_commit(B, 100),
        stream_commit(A, 200),
    ]
    assert told(assembled(messages)) == [(100, B, [(1, "b1"), (2, "b2")]), (200, A, [(1, "a1"), (2, "a2")])]


def test_a_transaction_that_is_rolled_back_leaves_nothing() -> None:
    assembler = assembled([*block(A, POSTS_DESCRIBED, insert("1")), stream_abort(A, A)])
    assert assembler.held_bytes == 0
    with pytest.raises(PgoutputError):
        assembler.feed(stream_commit(A, 100))


def test_rows_behind_a_savepoint_that_is_rolled_back_neither_come_nor_count() -> None:
    messages = [
        *block(A, POSTS_DESCRIBED, NOTES_DESCRIBED, insert("1")),
        *block(A, insert("2"), insert("n", NOTES), truncate(POSTS), first=False, subxid=A + 1),
        stream_abort(A, A + 1),
        *block(A, NOTES_DESCRIBED, POSTS_DESCRIBED, insert("m", NOTES), insert("3"), first=False),
        stream_commit(A, 100),
    ]
    assert told(assembled(messages)) == [(100, A, [(1, "1"), (3, "3")])]


def test_a_transaction_of_which_nothing_is_left_only_moves_the_reach() -> None:
    messages = [*block(A, POSTS_DESCRIBED, insert("1"), subxid=A + 1), stream_abort(A, A + 1), stream_commit(A, 100)]
    assembler = assembled(messages)
    assert told(assembler) == []
    assert assembler.reached == 110


# -- descriptions ----------------------------------------------------------------------------------------------------


def describing(messages: Iterable[bytes]) -> list[list[str]]:
    """The replica identities in the descriptions that the rows of each transaction come with."""
    assembler = assembled(messages)
    return [[row.described_by.identity for row in assembler.take().rows] for _ in range(len(assembler.ready))]


FULL = relation(POSTS, "posts", "f")


def test_a_description_holds_for_its_own_transaction_only_until_that_commits() -> None:
    before = [POSTS_DESCRIBED, *block(A, FULL, insert("a")), begin(100), insert("b"), commit(100)]
    after = [begin(300), insert("c"), commit(300)]
    assert describing([*before, stream_commit(A, 200), *after]) == [["d"], ["f"], ["f"]]
    assert describing([*before, stream_abort(A, A), *after]) == [["d"], ["d"]]


def test_a_description_that_came_before_a_newer_one_does_not_replace_it() -> None:
    messages = [
        *block(A, POSTS_DESCRIBED, insert("a")),
        *(begin(100), FULL, insert("b"), commit(100)),
        stream_commit(A, 200),
        *(begin(300), insert("c"), commit(300)),
    ]
    assert describing(messages) == [["f"], ["d"], ["f"]]


def test_a_description_ends_with_any_part_that_is_rolled_back() -> None:
    messages = [
        POSTS_DESCRIBED,
        *block(A, FULL, insert("a"), subxid=A + 1),
        stream_abort(A, A + 1),
    ]
    assert describing([*messages, stream_commit(A, 100), begin(200), insert("b"), commit(200)]) == [["d"]]
    with pytest.raises(PgoutputError, match="not described"):
        assembled([*messages, *block(A, insert("b"), first=False)])


def test_a_table_described_to_others_is_not_thereby_described_to_a_stream() -> None:
    with pytest.raises(PgoutputError, match="not described"):
        assembled([POSTS_DESCRIBED, *block(A, insert("a"))])


@pytest.mark.parametrize("message", [b"I\0\0\0\7N\0\1n", b"D\0\0\0\7K\0\3nnn"])
def test_a_row_that_does_not_fit_its_description_is_refused(message: bytes) -> None:
    with pytest.raises(PgoutputError, match="columns"):
        assembled([begin(100), POSTS_DESCRIBED, message])


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_beyond_the_bound_of_rows_only_tables_are_held() -> None:
    assembler = assembled([*block(A, *DESCRIPTIONS, *(insert(str(n)) for n in range(4)))], rows=3)
    assert assembler.held_bytes == 0
    for message in block(A, *(insert(str(n), NOTES) for n in range(50)), truncate(NOTES, POSTS), first=False):
        assembler.feed(message)
    assert assembler.held_bytes == 0
    assembler.feed(stream_commit(A, 100))
    assert told(assembler) == [(100, A, {"public.posts"})]


def test_what_is_met_only_after_the_rows_were_dropped_is_told_too() -> None:
    messages = [
        *block(A, *DESCRIPTIONS, *(insert(str(n)) for n in range(4))),
        *block(A, truncate(NOTES), first=False),
        stream_commit(A, 100),
    ]
    assert told(assembled(messages, rows=3, references=["public.notes"])) == [
        (100, A, {"public.posts", "public.notes"})
    ]


def test_a_savepoint_rolled_back_after_the_rows_were_dropped_changes_nothing() -> None:
    messages = [
        *block(A, POSTS_DESCRIBED, *(insert(str(n)) for n in range(4)), subxid=A + 1),
        stream_abort(A, A + 1),
        stream_commit(A, 100),
    ]
    assert told(assembled(messages, rows=3)) == [(100, A, {"public.posts"})]
    assert told(assembled([*messages[:-1], stream_abort(A, A)], rows=3)) == []


def test_rows_that_were_rolled_back_in_time_make_no_transaction_bulk() -> None:
    messages = block(A, POSTS_DESCRIBED, insert("1"))
    for n in range(1, 6):
        messages += block(A, POSTS_DESCRIBED, insert("x"), insert("y"), first=False, subxid=A + n)
        messages.append(stream_abort(A, A + n))
    assert told(assembled([*messages, stream_commit(A, 100)], rows=3)) == [(100, A, [(1, "1")])]


def test_the_bound_of_bytes_holds_for_one_and_for_all_together() -> None:
    one = block(A, POSTS_DESCRIBED, *(insert("1" * 400) for _ in range(4)))
    assert told(assembled([*one, stream_commit(A, 100)], size=2000)) == [(100, A, {"public.posts"})]
    small = block(B, POSTS_DESCRIBED, insert("b"))
    assembler = assembled([*one, *small], size=3500)
    assert 0 < assembler.held_bytes < 1000  # the large one was given up
    for message in (stream_commit(B, 100), stream_commit(A, 200)):
        assembler.feed(message)
    assert told(assembler) == [(100, B, [(1, "b")]), (200, A, {"public.posts"})]


def test_many_savepoints_cost_no_more_than_the_bound() -> None:
    messages = [stream_start(A), within(A, NOTES_DESCRIBED)]
    messages += [within(A + n, insert("x", NOTES)) for n in range(100)]
    assembler = assembled([*messages, STREAM_STOP], size=3000)
    assert assembler.held_bytes == 0
    assembler.feed(stream_commit(A, 100))
    assert told(assembler) == []


def test_a_table_that_policies_refer_to_only_since_its_rows_came_makes_the_transaction_bulk() -> None:
    references: list[str] = []
    messages = block(A, *DESCRIPTIONS, insert("1"), insert("n", NOTES))
    assembler = assembled(messages, references=references)
    references.append("public.notes")
    assembler.feed(stream_commit(A, 100))
    assert told(assembler) == [(100, A, {"public.posts", "public.notes"})]


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_bulk_transaction_before_the_place_is_not_told_again() -> None:
    messages = [*block(A, POSTS_DESCRIBED, *(insert(str(n)) for n in range(4))), stream_commit(A, 100)]
    assert told(assembled(messages, rows=3, after=Place(101, 0))) == []
    assert told(assembled(messages, rows=3, after=Place(100, 0))) == [(100, A, {"public.posts"})]


@dataclass
class Written:
    """A transaction as it was written: the row messages, each by a subtransaction, and which of these were rolled back.

    The subtransactions are numbered; 0 is the whole one. A `None` in the place of a message rolls the writer back.
    """

    xid: int
    steps: list[tuple[int, bytes | None]] = field(default_factory=list)

    @property
    def kept(self) -> list[bytes]:
        gone = {writer for writer, message in self.steps if message is None}
        return [message for writer, message in self.steps if message is not None and writer not in gone]


@st.composite
def transactions(draw: st.DrawFn) -> list[Written]:
    keys = iter(range(10_000))
    found = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        written = Written(number * 1000)
        gone: set[int] = set()
        for _ in range(draw(st.integers(0, 12))):
            writer = draw(st.integers(0, 3).filter(lambda writer: writer not in gone))  # noqa: B023 - drawn at once
            if writer and draw(st.integers(0, 3)) == 0:
                gone.add(writer)
                written.steps.append((writer, None))
            else:
                table = draw(st.sampled_from([POSTS, POSTS, NOTES]))
                key = str(next(keys))
                written.steps.append((writer, draw(st.sampled_from([insert(key, table), truncate(POSTS)]))))
        found.append(written)
    return found


def sent_whole(history: Sequence[Written]) -> list[bytes]:
    """Each after its commit, in the order of the commits."""
    messages = list(DESCRIPTIONS)
    for n, written in enumerate(history, 1):
        messages += [begin(n * 100, written.xid), *written.kept, commit(n * 100)]
    return messages


class Blocks:
    """Sends steps of transactions, those of one that follow each other in one block."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.begun: set[int] = set()
        self._inside: int | None = None
        self._described: set[int] = set()

    def send(self, xid: int, writer: int, message: bytes | None) -> None:
        if message is None:
            self.end(stream_abort(xid, xid + writer))
            self._described.discard(xid)
            return
        if self._inside != xid:
            self.end(stream_start(xid, first=xid not in self.begun))
            self.begun.add(xid)
            self._inside = xid
        known = [] if xid in self._described else DESCRIPTIONS
        self._described.add(xid)
        self.messages += [within(xid + writer, part) for part in (*known, message)]

    def end(self, message: bytes) -> None:
        """End the block, if there is one, and send what stands outside of blocks."""
        self.messages += [message] if self._inside is None else [STREAM_STOP, message]
        self._inside = None


def sent_in_blocks(history: Sequence[Written], turns: Iterable[int]) -> list[bytes]:
    """Each step of a transaction when it is its turn, and the end of each after that of the one before it."""
    blocks = Blocks()
    left = {written.xid: list(written.steps) for written in history}
    for turn in turns:
        unfinished = [xid for xid, steps in left.items() if steps]
        if unfinished:
            xid = unfinished[turn % len(unfinished)]
            blocks.send(xid, *left[xid].pop(0))
    for n, written in enumerate(history, 1):
        for step in left[written.xid]:
            blocks.send(written.xid, *step)
        if written.xid in blocks.begun:
            blocks.end(stream_commit(written.xid, n * 100))
    return blocks.messages


@given(transactions(), st.lists(st.integers(0, 3), max_size=40), st.data())
def test_sent_in_blocks_or_whole_the_same_is_told_from_any_place(
    history: list[Written], turns: list[int], data: st.DataObject
) -> None:
    whole = sent_whole(history)
    places = [Place(lsn, n) for lsn, _, found in told(assembled(whole)) for n, _ in found]  # type: ignore[attr-defined]
    after = data.draw(st.sampled_from([START, *places]))
    assert told(assembled(sent_in_blocks(history, turns), after=after)) == told(assembled(whole, after=after))


@given(transactions(), st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6), st.integers(600, 3000))
def test_whatever_the_bounds_every_transaction_is_told_by_its_rows_or_by_its_tables(
    history: list[Written], turns: list[int], rows: int, size: int
) -> None:
    whole = {lsn: found for lsn, _, found in told(assembled(sent_whole(history)))}
    assembler = Assembler(["public.posts"], after=START, transaction_rows=rows, transaction_bytes=size)
    for message in sent_in_blocks(history, turns):
        assembler.feed(message)
        if message == STREAM_STOP:
            assert assembler.held_bytes <= size
    bounded = {lsn: found for lsn, _, found in told(assembler)}
    assert all(bounded[lsn] in (found, {"public.posts"}) for lsn, found in whole.items())
    assert all(bounded[lsn] == {"public.posts"} for lsn in bounded.keys() - whole.keys())
    assert assembler.held_bytes == 0


# -- what does not belong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [stream_start(A), stream_start(B)],
        [stream_start(A), begin(100)],
        [begin(100), stream_start(A)],
        [begin(100), STREAM_STOP],
        [stream_start(A), commit(100)],
        [*block(A), stream_start(A, first=True)],
        [stream_start(A, first=False)],
        [STREAM_STOP],
        [stream_commit(A, 100)],
        [stream_start(A), stream_commit(A, 100)],
        [stream_start(A), stream_abort(A, A)],
        [*block(A, POSTS_DESCRIBED), POSTS_DESCRIBED, insert("1")],
    ],
)
def test_blocks_out_of_order_are_refused(messages: list[bytes]) -> None:
    with pytest.raises(PgoutputError):
        assembled(messages)
