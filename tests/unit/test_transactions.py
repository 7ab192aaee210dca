"""Transactions are gathered with bounded memory, and become bodies whose places mean the same at every reading."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Change, Column, Control, Relation
from realtime_bridge.pgoutput import PgoutputError, RelationMessage
from realtime_bridge.sources.assembler import Assembler
from realtime_bridge.sources.transactions import (
    BodyBuilder,
    Described,
    NamedTable,
    Place,
    Placed,
    Transaction,
    Watermark,
    lsn_text,
    parse_lsn,
)
from tests.pgoutputs import (
    DESCRIPTIONS,
    NOTES,
    POSTS,
    begin,
    commit,
    delete,
    insert,
    relation,
    truncate,
    update,
)

START = Place(0, 0)
TABLES = ["public.posts"]


def assembled(messages: Iterable[bytes], *, after: Place = START, rows: int = 100, size: int = 10**6) -> Assembler:
    assembler = Assembler(TABLES, after=after, transaction_rows=rows, transaction_bytes=size)
    for message in messages:
        assembler.feed(message)
    return assembler


def described(message: RelationMessage, *, identifies: bool = True) -> Described:
    columns = tuple(Column(c.name, "int8" if c.type_id == 20 else "text") for c in message.columns)
    table = Relation(message.schema, message.table, columns, (0,), message.identity == "f")
    return Described(message, table, identifies)


def built(transaction: Transaction, builder: BodyBuilder | None = None, *, identifies: bool = True) -> list[Placed]:
    tables = {key: described(m, identifies=identifies) for key, m in transaction.descriptions.items()}
    return (builder or BodyBuilder()).build(transaction, tables)


def told(bodies: Iterable[Placed]) -> list[str]:
    """Bodies in short: `INSERT 1`, `catalog`, `bulk`."""
    answer = []
    for placed in bodies:
        body = placed.body
        if isinstance(body, Change):
            image = body.new if body.new is not None else body.old
            assert image is not None
            answer.append(f"{body.operation} {image[0]}")
        else:
            answer.append(str(body.reason or body.kind))
    return answer


def one(messages: Iterable[bytes], *, rows: int = 100, size: int = 10**6) -> Transaction:
    return assembled([begin(100), *messages, commit(100)], rows=rows, size=size).take()


def test_rows_of_other_tables_count_but_are_not_kept() -> None:
    transaction = one([*DESCRIPTIONS, insert("1", NOTES), insert("2"), insert("3", NOTES), insert("4")])
    assert [row.ordinal for row in transaction.rows] == [2, 4]
    assert told(built(transaction)) == ["catalog", "INSERT 2", "INSERT 4"]


def test_tables_that_policies_refer_to_are_gathered_from_when_they_do() -> None:
    references: set[str] = set()
    assembler = Assembler(TABLES, after=START, transaction_rows=100, references=lambda: references)
    for message in (begin(100), *DESCRIPTIONS, insert("1", NOTES), commit(100)):
        assembler.feed(message)
    assert not assembler.ready
    references.add("public.notes")
    for message in (begin(200), insert("2", NOTES), insert("3"), commit(200)):
        assembler.feed(message)
    assert told(built(assembler.take())) == ["catalog", "INSERT 2", "catalog", "INSERT 3"]


def test_a_transaction_about_other_tables_only_moves_the_reach() -> None:
    assembler = assembled([begin(100), *DESCRIPTIONS, insert("1", NOTES), commit(100)])
    assert not assembler.ready
    assert assembler.reached == 110


def test_a_keepalive_within_a_transaction_proves_nothing() -> None:
    assembler = assembled([begin(100)])
    assembler.keepalive(500)
    assert assembler.reached == 0
    assembler.feed(commit(100))
    assembler.keepalive(90)
    assert assembler.reached == 110


def test_another_table_of_the_same_name_is_other_rows() -> None:
    other = 9
    messages = [DESCRIPTIONS[0], insert("1"), relation(other, "posts"), insert("1", other)]
    assert told(built(one(messages))) == ["catalog", "INSERT 1", "catalog", "schema_changed", "INSERT 1"]


def test_a_table_that_is_renamed_away_is_not_read_any_more() -> None:
    renamed = relation(POSTS, "archive")
    assert told(built(one([DESCRIPTIONS[0], insert("1"), renamed, insert("2")]))) == ["catalog", "INSERT 1"]


def test_a_table_that_is_renamed_away_and_back_has_changed_all_the_same() -> None:
    renamed = (begin(100), relation(POSTS, "former"), insert("1"), DESCRIPTIONS[0], insert("2"), commit(100))
    assembler = assembled(renamed)
    assert not assembler.take().bulk, "as long as nobody knows whose rows those are"
    assembler.names = {POSTS: "public.posts"}
    for message in renamed:
        assembler.feed(message)
    assert told(built(assembler.take())) == ["bulk"]


def test_too_many_rows_become_one_resync_a_table() -> None:
    transaction = one([DESCRIPTIONS[0], *(insert(str(i)) for i in range(4))], rows=3)
    assert not transaction.rows
    assert told(built(transaction)) == ["bulk"]
    assert told(built(one([DESCRIPTIONS[0], *(insert(str(i)) for i in range(3))], rows=3)))[1:] == [
        "INSERT 0",
        "INSERT 1",
        "INSERT 2",
    ]


def test_too_many_bytes_are_bulk_too() -> None:
    transaction = one([DESCRIPTIONS[0], insert("1" * 100), insert("2" * 100)], size=150)
    assert told(built(transaction)) == ["bulk"]


def test_what_is_taken_is_no_longer_counted() -> None:
    assembler = assembled([begin(100), DESCRIPTIONS[0], insert("1"), commit(100)])
    assert (assembler.ready_rows, assembler.ready_bytes > 0) == (1, True)
    assembler.take()
    assert (assembler.ready_rows, assembler.ready_bytes) == (0, 0)


HISTORY = [
    (begin(100), DESCRIPTIONS[0], insert("1"), insert("2"), commit(100)),
    (begin(200), insert("3"), DESCRIPTIONS[1], insert("n", NOTES), truncate(NOTES, POSTS), insert("4"), commit(200)),
    (begin(300), relation(POSTS, "posts"), delete("4"), commit(300)),
]


def read(after: Place) -> list[Placed]:
    messages = [message for transaction in HISTORY for message in transaction]
    assembler, builder = assembled(messages, after=after), BodyBuilder()
    return [placed for _ in range(len(assembler.ready)) for placed in built(assembler.take(), builder)]


@given(st.data())
def test_resuming_after_any_body_skips_no_row_and_repeats_none(data: st.DataObject) -> None:
    whole = read(Place(0, 0))
    cut = data.draw(st.integers(1, len(whole)))
    again = read(whole[cut - 1].place)
    rows = [word for word in told(whole[:cut]) + told(again) if " " in word]
    assert rows == ["INSERT 1", "INSERT 2", "INSERT 3", "INSERT 4", "DELETE 4"]
    assert ("truncated" in told(whole[:cut])) or ("truncated" in told(again))


def test_places_never_go_back() -> None:
    places = [placed.place for placed in read(Place(0, 0))]
    assert places == sorted(places)


def test_the_end_of_a_transaction_is_behind_all_its_rows() -> None:
    assert told(read(Place(110, 0))) == told(read(Place(100, 2)))


def test_every_new_description_announces_the_catalog_before_its_first_row() -> None:
    assert told(read(Place(0, 0))) == [
        "catalog",
        "INSERT 1",
        "INSERT 2",
        "INSERT 3",
        "truncated",
        "INSERT 4",
        "catalog",
        "DELETE 4",
    ]


def test_another_shape_of_the_table_makes_copies_doubtful() -> None:
    full = relation(POSTS, "posts", identity="f")
    messages = [DESCRIPTIONS[0], insert("1"), full, insert("2")]
    assert told(built(one(messages))) == ["catalog", "INSERT 1", "catalog", "schema_changed", "INSERT 2"]


def test_a_key_image_says_absent_where_pgoutput_writes_null() -> None:
    bodies = built(one([DESCRIPTIONS[0], delete("1"), update(("1", None), ("2", "x"))]))
    gone, moved = bodies[1].body, bodies[2].body
    assert isinstance(gone, Change)
    assert isinstance(moved, Change)
    assert (gone.old, gone.new) == (("1", ABSENT), None)
    assert (moved.old, moved.new) == (("1", ABSENT), ("2", "x"))


def test_an_update_takes_unchanged_values_from_whatever_the_old_row_holds() -> None:
    full = relation(POSTS, "posts", identity="f")
    messages = [full, update(("1", "large"), ("1", ABSENT), b"O")]
    body = built(one(messages))[-1].body
    assert isinstance(body, Change)
    assert (body.old, body.new) == (("1", "large"), ("1", "large"))
    body = built(one([DESCRIPTIONS[0], update(("1", None), (ABSENT, ABSENT))]))[-1].body
    assert isinstance(body, Change)
    assert body.new == ("1", ABSENT)


def test_without_the_key_in_old_rows_a_table_is_told_as_doubtful_once_a_transaction() -> None:
    transaction = one([DESCRIPTIONS[0], insert("1"), delete("1"), delete("2"), update(None, ("3", "x"))])
    bodies = built(transaction, identifies=False)
    assert told(bodies) == ["catalog", "INSERT 1", "upstream_gap"]
    control = bodies[-1].body
    assert isinstance(control, Control)
    assert control.table == "public.posts"


@pytest.mark.parametrize(
    "messages",
    [
        [begin(1), begin(1)],
        [commit(1)],
        [DESCRIPTIONS[0], insert("1")],
        [begin(1), insert("1")],
        [begin(1), truncate(POSTS)],
        [b""],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[bytes]) -> None:
    with pytest.raises(PgoutputError):
        assembled(messages)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**9))
def test_lsns_and_watermarks_survive_as_text(lsn: int, ordinal: int) -> None:
    assert parse_lsn(lsn_text(lsn)) == lsn
    watermark = Watermark("7/1/slot", lsn, Place(lsn, ordinal), frozenset([NamedTable("public.a|b", 7, 8)]))
    assert Watermark.parse(str(watermark)) == watermark


def test_a_watermark_of_a_former_version_names_no_tables() -> None:
    assert Watermark.parse("7/1/slot|a|b|1") == Watermark("7/1/slot", 10, Place(11, 1))


@pytest.mark.parametrize("text", ["", "supabase:1", "a|b|c|d", "a|1|2", "a|1|2|3|4", "a|1|2|3|[4]", "a|1|2|3|"])
def test_a_foreign_watermark_is_none(text: str) -> None:
    assert Watermark.parse(text) is None
