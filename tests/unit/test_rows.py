"""The row index: what is put in as the old row is the old row, or nothing is."""

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime_bridge import seeding
from realtime_bridge.broker.base import RowChange
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Image, Relation
from realtime_bridge.errors import DatabaseError
from realtime_bridge.rows import IndexState, RowIndex
from realtime_bridge.seeding import Seeder
from realtime_bridge.sources.base import TEXT_BYTES, Page
from tests.services import eventually

POSTS = Relation(
    "public", "posts", (Column("id", "int8"), Column("owner", "text"), Column("body", "text")), (0,), False
)
T = POSTS.name
GAP = Control("resync", "*", "upstream_gap")
LONG = "x" * (TEXT_BYTES + 1)


def row(key: int, owner: str = "ada", body: str = "b") -> Image:
    return str(key), owner, body


def key_only(key: int) -> Image:
    return str(key), ABSENT, ABSENT


def insert(new: Image, time: int = 1) -> Change:
    return Change("INSERT", POSTS, None, new, time)


def update(new: Image, time: int = 2, old: Image | None = None) -> Change:
    return Change("UPDATE", POSTS, old, new, time)


def delete(key: int, time: int = 3) -> Change:
    return Change("DELETE", POSTS, key_only(key), None, time)


class Tables:
    """A reader of tables that stand still unless the test changes them.

    Attributes:
        content: rows by table and key.
        time: when they are read.
        problem: what keeps them from being read.
        readings: how often they were begun to be read.
        gate: a permit is taken before each page is read,
        arrivals: and another one before it is handed over.
    """

    def __init__(self, relations: Sequence[Relation] = (POSTS,)) -> None:
        self.relations = {relation.name: relation for relation in relations}
        self.content: dict[str, dict[str, Image]] = {relation.name: {} for relation in relations}
        self.time = 0
        self.problem = ""
        self.readings = 0
        self.gate = asyncio.Semaphore(1000)
        self.arrivals = asyncio.Semaphore(1000)

    def put(self, *rows: Image, table: str = T) -> None:
        self.content[table] |= {str(row[0]): row for row in rows}

    async def describe(self, table: str) -> Relation | None:
        return self.relations.get(table)

    async def pages(self, relation: Relation) -> AsyncGenerator[Page, None]:
        self.readings += 1
        after = ""
        while True:
            await self.gate.acquire()
            if self.problem:
                raise DatabaseError(self.problem)
            found = sorted(key for key in self.content[relation.name] if key > after)[:2]
            if not found:
                return
            page = Page([self.content[relation.name][key] for key in found], self.time)
            after = found[-1]
            await self.arrivals.acquire()
            yield page

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        content = self.content[relation.name]
        return [content[key] for (key,) in keys if key in content]


@dataclass
class Term:
    """A leader: what it appends is completed, and the tables are seeded beside."""

    broker: MemoryBroker
    tables: Tables
    names: Sequence[str] = (T,)
    state: IndexState = field(default_factory=IndexState)

    def __post_init__(self) -> None:
        self.rows = RowIndex(self.broker, self.names, self.state)

    async def lead(self) -> None:
        self.token = await self.broker.acquire_lease(ttl=3600)
        seeder = Seeder(self.broker, self.tables, self.rows, self.names, self.state, self.token)
        self.seeding = asyncio.create_task(seeder.run())

    async def append(self, *bodies: Body) -> list[Any]:
        async with self.rows.turn:
            completed, rows = await self.rows.complete(bodies)
            await self.broker.append(self.token, completed, rows=rows)
        self.rows.begun.set()
        return completed

    async def olds(self, *bodies: Body) -> list[Image | None]:
        return [body.old for body in await self.append(*bodies)]

    async def seeded(self) -> None:
        self.rows.begun.set()
        await eventually(lambda: self.state.unread == 0)

    async def end(self) -> None:
        self.seeding.cancel()
        await asyncio.wait([self.seeding])
        assert self.seeding.cancelled(), self.seeding.exception()
        await self.broker.release_lease(self.token)


LIMITS: Any = {"history_size": 1000, "history_bytes": 1 << 20, "history_seconds": 3600, "row_index_bytes": 1 << 20}


@asynccontextmanager
async def leading(
    tables: Tables | None = None, broker: MemoryBroker | None = None, names: Sequence[str] = (T,)
) -> AsyncIterator[Term]:
    """One term after another, on the same broker or on one of its own."""
    term = Term(broker or MemoryBroker(**LIMITS), tables or Tables(), names)
    await term.lead()
    yield term
    await term.end()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_PAUSE_FIRST", 0.0)
    monkeypatch.setattr(seeding, "_PAUSE_MOST", 0.0)


# -- what changes have written ---------------------------------------------------------------------------------------


async def test_a_change_finds_the_row_that_the_one_before_it_made() -> None:
    async with leading() as term:
        await term.append(insert(row(1)))
        assert await term.olds(update(row(1, "bob"))) == [row(1)]
        assert await term.olds(delete(1)) == [row(1, "bob")]
        assert await term.olds(delete(1)) == [key_only(1)]
        assert term.state.unknown == 1


async def test_changes_of_one_batch_see_each_other_in_order() -> None:
    async with leading() as term:
        olds = await term.olds(
            insert(row(1)), update(row(1, "bob")), delete(1), insert(row(1, "eve")), update(row(1, "ada")), delete(2)
        )
        assert olds == [None, row(1), row(1, "bob"), None, row(1, "eve"), key_only(2)]
        assert await term.olds(delete(1)) == [row(1, "ada")]


async def test_a_changed_key_takes_its_row_along() -> None:
    async with leading() as term:
        await term.append(insert(row(1)))
        assert await term.olds(update(row(2), old=key_only(1)), update(row(2, "bob")), delete(1)) == [
            row(1),
            row(2),
            key_only(1),
        ]


async def test_what_the_source_brings_of_an_old_row_wins() -> None:
    async with leading() as term:
        await term.append(insert(row(1, "ada", "old")))
        brought: Image = ("1", "eve", ABSENT)
        assert await term.olds(update(row(1), old=brought)) == [("1", "eve", "old")]
        assert await term.olds(update(row(1), old=row(1, "x", "y"))) == [row(1, "x", "y")]
        assert term.state.unknown == 0


async def test_what_was_told_of_an_old_row_wins_over_a_source_that_may_lose_changes() -> None:
    async with leading() as term:
        term.rows = RowIndex(term.broker, term.names, term.state, is_lossy=True)
        await term.append(insert(row(1, "ada", LONG)))
        assert await term.olds(update(row(1), old=row(1, "eve", LONG + "y"))) == [row(1, "ada", LONG + "y")]
        unknown, known = update(row(2), old=row(2, "eve")), insert(row(1, "bob"))
        assert await term.olds(unknown, known) == [row(2, "eve"), row(1), None]
        assert term.state.unknown == 0


async def test_a_row_that_may_have_been_read_behind_an_insert_is_not_ended_by_it() -> None:
    async with leading() as term:
        term.rows = RowIndex(term.broker, term.names, term.state, is_lossy=True)
        term.tables.put(row(1))
        term.tables.time = 5
        await term.end()
        await term.lead()
        await term.seeded()
        assert await term.append(insert(row(1), 5)) == [insert(row(1), 5)]


async def test_long_texts_are_not_kept_but_a_key_is_known_however_long() -> None:
    exactly = "ü" * (TEXT_BYTES // 2)
    key = "k" * 1000
    async with leading() as term:
        await term.append(insert(row(1, exactly, LONG)), insert((key, exactly + "x", None)))
        assert await term.olds(delete(1)) == [("1", exactly, ABSENT)]
        assert await term.olds(update((key, "a", "b"))) == [(key, ABSENT, None)]


async def test_a_large_value_that_did_not_change_is_taken_from_the_old_row() -> None:
    async with leading() as term:
        await term.append(insert(row(1, "ada", "kept")), insert(row(2, "ada", LONG)))
        known, unknown = await term.append(update(("1", "bob", ABSENT)), update(("2", "bob", ABSENT)))
        assert (known.new, unknown.new) == (row(1, "bob", "kept"), ("2", "bob", ABSENT))
        assert await term.olds(delete(1), delete(2)) == [row(1, "bob", "kept"), ("2", "bob", ABSENT)]


async def test_a_row_whose_key_cannot_be_told_leaves_no_row_in_doubt() -> None:
    async with leading() as term:
        await term.append(insert(row(1)), insert(row(2)))
        await term.append(update((ABSENT, "bob", "b")))
        assert await term.olds(delete(1), delete(2)) == [key_only(1), key_only(2)]


# -- what makes a table begin anew -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control",
    [GAP, *(Control("resync", T, reason) for reason in ("upstream_gap", "bulk", "schema_changed", "truncated"))],
)
async def test_behind_a_doubt_no_row_is_known_until_it_is_told_or_read_again(control: Control) -> None:
    async with leading() as term:
        term.tables.gate = asyncio.Semaphore(0)
        await term.append(insert(row(1)), insert(row(2)))
        bodies = await term.append(update(row(1, "bob")), control, update(row(1, "eve")), delete(2))
        assert bodies == [update(row(1, "bob"), old=row(1)), control, update(row(1, "eve")), delete(2)]
        assert await term.olds(delete(1)) == [row(1, "eve")]


async def test_other_controls_and_other_tables_doubts_change_nothing() -> None:
    elsewhere = Change("DELETE", replace(POSTS, table="x"), key_only(1), None, 1)
    async with leading() as term:
        await term.append(insert(row(1)))
        others: list[Body] = [Control("catalog", T), Control("resync", "public.x", "bulk"), elsewhere]
        assert await term.append(*others) == others
        assert await term.olds(delete(1)) == [row(1)]
        assert T in await term.broker.indexed()
        assert "public.x" not in await term.broker.indexed()


async def test_a_truncated_table_needs_no_reading() -> None:
    async with leading() as term:
        await term.seeded()
        await term.append(insert(row(1)), Control("resync", T, "truncated"), insert(row(2)))
        await term.append()
        assert await term.olds(delete(1), delete(2)) == [key_only(1), row(2)]
        assert term.tables.readings == 1


async def test_rows_laid_out_in_another_way_count_for_nothing() -> None:
    wider = replace(POSTS, columns=(*POSTS.columns, Column("mood", "text")))
    async with leading() as term:
        term.tables.gate = asyncio.Semaphore(0)
        await term.append(insert(row(1)), insert(row(2)))
        first = Change("UPDATE", wider, None, (*row(1), "glad"), 4)
        second = Change("DELETE", wider, ("1", ABSENT, ABSENT, ABSENT), None, 5)
        assert await term.olds(first, second, delete(2)) == [None, (*row(1), "glad"), key_only(2)]


async def test_rows_noted_in_another_form_count_for_nothing() -> None:
    async with leading() as term:
        await term.append(insert(row(1)))
        await term.broker.append(term.token, (), rows=[RowChange(T, "", b"2 whatever else")])
        assert await term.olds(delete(1)) == [key_only(1)]


class Untouched(MemoryBroker):
    """A broker whose row index must not be needed."""

    async def rows(self, table: str, fields: Sequence[str]) -> list[bytes | None]:
        raise AssertionError("read")


async def test_tables_that_bring_their_old_rows_cost_nothing() -> None:
    full = replace(POSTS, full=True)
    bodies = [Change("UPDATE", full, row(1), row(1, "bob"), 1), Change("DELETE", full, row(1), None, 2)]
    completed, rows = await RowIndex(Untouched(**LIMITS), [T], IndexState()).complete(bodies)
    assert (completed, rows) == (bodies, [RowChange(T)])


@pytest.mark.parametrize("other", [replace(POSTS, full=True), replace(POSTS, key=())])
async def test_rows_that_nothing_keeps_up_to_date_are_forgotten(other: Relation) -> None:
    async with leading() as term:
        await term.append(insert(row(1)))
        change = Change("UPDATE", other, row(1), row(1, "bob"), 2)
        assert await term.append(change) == [change]
        assert await term.olds(delete(1)) == [key_only(1)]


# -- what was read -----------------------------------------------------------------------------------------------------


async def test_rows_that_have_not_changed_are_read() -> None:
    tables = Tables()
    tables.put(*(row(key) for key in range(1, 6)))
    async with leading(tables) as term:
        await term.seeded()
        assert await term.olds(delete(1), update(row(5, "bob"), 4)) == [row(1), row(5)]
        assert term.state.unknown == 0


async def test_nothing_is_read_before_the_source_is() -> None:
    tables = Tables()
    async with leading(tables) as term:
        await settle()
        assert tables.readings == 0
        await term.append(GAP)
        await eventually(lambda: tables.readings == 1)


async def test_what_the_source_tells_of_a_table_wins_over_what_was_expected() -> None:
    wider = replace(POSTS, columns=(*POSTS.columns, Column("mood", "text")))
    looked = asyncio.Event()

    class Hesitant(Tables):
        async def describe(self, table: str) -> Relation | None:
            await looked.wait()
            return POSTS

    async with leading(Hesitant()) as term:
        term.rows.begun.set()
        await settle()
        await term.append(Change("INSERT", wider, None, (*row(1), "glad"), 1))
        looked.set()
        await settle()
        gone = Change("DELETE", wider, ("1", ABSENT, ABSENT, ABSENT), None, 2)
        assert await term.olds(gone) == [(*row(1), "glad")]


async def test_a_row_that_may_show_the_change_itself_is_not_its_old_row() -> None:
    tables = Tables()
    tables.time = 10
    tables.put(row(1, "new"), row(2, "new"))
    async with leading(tables) as term:
        await term.seeded()
        on_the_way = update(row(1, "new"), time=10)
        assert await term.olds(on_the_way, update(row(1, "newer"), time=11)) == [None, row(1, "new")]
        assert await term.olds(update(row(2, "newer"), time=11)) == [row(2, "new")]


async def test_what_a_change_wrote_is_not_overwritten_by_what_was_read() -> None:
    tables = Tables()
    tables.gate = asyncio.Semaphore(0)
    tables.time = 10
    tables.put(row(1, "later"))
    async with leading(tables) as term:
        await term.append(insert(row(1, "first"), time=9))
        tables.gate.release()
        tables.gate.release()
        await term.seeded()
        assert await term.olds(update(row(1, "later"), time=10)) == [row(1, "first")]


async def test_a_page_read_before_a_doubt_is_not_stored_behind_it() -> None:
    tables = Tables()
    tables.gate = asyncio.Semaphore(1)
    tables.put(row(1), row(2), row(3))
    async with leading(tables) as term:
        term.rows.begun.set()
        await eventually(lambda: tables.readings == 1 and tables.gate.locked())
        await term.append(GAP)  # the first page may be stored already; the second is of the same reading
        tables.content[T] = {"3": row(3, "bob")}
        tables.gate.release()
        await eventually(lambda: tables.readings == 2)
        assert await term.olds(delete(1), delete(3)) == [key_only(1), key_only(3)]
        for _ in range(2):
            tables.gate.release()
        await term.seeded()


async def test_a_successor_goes_on_with_what_is_there() -> None:
    broker, tables = MemoryBroker(**LIMITS), Tables()
    tables.put(row(1))
    async with leading(tables, broker) as term:
        await term.seeded()
        await term.append(insert(row(2)))
    async with leading(tables, broker) as successor:
        await successor.seeded()
        assert await successor.olds(delete(1), delete(2)) == [row(1), row(2)]
    assert tables.readings == 1


async def test_tables_that_are_configured_no_longer_are_forgotten() -> None:
    other = replace(POSTS, table="comments")
    broker, tables = MemoryBroker(**LIMITS), Tables([POSTS, other])
    tables.put(row(1))
    tables.put(row(1), table=other.name)
    async with leading(tables, broker, names=[T, other.name]) as term:
        await term.seeded()
        assert set(await broker.indexed()) == {T, other.name}
    async with leading(tables, broker) as successor:
        await successor.seeded()
        assert set(await broker.indexed()) == {T}


async def test_a_table_that_only_the_source_can_describe_is_read_from_its_first_change_on() -> None:
    broker, tables = MemoryBroker(**LIMITS), Tables([])
    tables.content[T] = {"1": row(1)}
    async with leading(tables, broker) as term:
        await term.seeded()
        assert await term.olds(delete(1)) == [key_only(1)]
        await eventually(lambda: tables.readings == 1)
        await term.seeded()
        assert await term.olds(delete(1, time=4)) == [row(1)]
    async with leading(tables, broker) as successor:  # which has not heard of the table yet, but reads the note
        await successor.append(GAP)
        await eventually(lambda: tables.readings == 2)
        await successor.seeded()
        assert await successor.olds(delete(1, time=4)) == [row(1)]


async def test_a_table_that_cannot_be_read_is_tried_again_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tables = Tables()
    tables.put(row(1))
    tables.problem = "Postgres cannot be reached"
    async with leading(tables) as term:
        await term.append(GAP)
        await eventually(lambda: tables.readings == 1)
        await term.append(GAP)
        await eventually(lambda: tables.readings == 2)
        assert (term.state.unread, caplog.text.count("row index cannot be seeded")) == (1, 1)
        tables.problem = ""
        await term.append(GAP)
        await term.seeded()
        assert await term.olds(delete(1)) == [row(1)]


def test_a_table_that_is_doubted_often_is_read_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_PAUSE_FIRST", 1.0)
    monkeypatch.setattr(seeding, "_PAUSE_MOST", 60.0)
    now = 1000.0
    pace = seeding._Pace()
    waits = []
    for _ in range(9):
        pace.step(now)
        waits.append(pace.next_at - now)
        now = pace.next_at
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now += 61
    pace.step(now)
    assert pace.next_at == now + 1


async def test_a_fault_in_reading_a_table_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    tables = Tables()
    tables.content = {}  # so that a page is a KeyError
    async with leading(tables) as term:
        await term.append(insert(row(1)))
        await eventually(lambda: "row index cannot be seeded" in caplog.text)
        assert await term.olds(delete(1)) == [row(1)]


async def test_rows_that_find_no_room_are_unknown_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tables = Tables()
    tables.put(*(row(key) for key in range(1, 6)))
    async with leading(tables, MemoryBroker(**{**LIMITS, "row_index_bytes": 400})) as term:
        await term.seeded()
        await eventually(lambda: term.state.left_out)
        olds = await term.olds(*(delete(key) for key in range(1, 6)))
        known = [old for old in olds if old is not None and ABSENT not in old]
        assert 0 < len(known) < 5
        assert term.state.unknown == 5 - len(known)
        assert caplog.text.count("no room for all rows") == 1


async def test_of_a_table_that_is_too_large_the_rest_is_not_read() -> None:
    tables = Tables()
    tables.put(*(row(key) for key in range(1, 9)))
    tables.gate = asyncio.Semaphore(1)  # for a page of two
    async with leading(tables, MemoryBroker(**{**LIMITS, "row_index_bytes": 1})) as term:
        await term.seeded()
        await eventually(lambda: term.state.left_out == 2)


# -- any interleaving --------------------------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=3)),
        st.tuples(st.just("tell"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["read", "arrive"]), st.integers(1, 3)),
        st.tuples(st.sampled_from(["lose", "truncate", "take over", "replicate", "fail over"]), st.none()),
    ),
    min_size=5,
    max_size=40,
)


class World:
    """A table whose changes are told late, read at any moment, lost, or told again after a failover of the broker."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.tables = Tables()
        self.tables.gate, self.tables.arrivals = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.tables.put(*(row(key) for key in range(1, 5)))  # from before anyone led
        self.term = Term(broker, self.tables)
        self.broker = broker
        self.log: list[tuple[Body, Image | None]] = []  # with the true old row
        self.told = 0
        self.replica: tuple[Any, int] | None = None
        self.completed = 0

    async def step(self, name: str, argument: Any) -> None:
        match name:
            case "write":
                self.write(argument)
            case "tell":
                await self.tell(argument)
            case "read" | "arrive":
                for _ in range(argument):
                    (self.tables.gate if name == "read" else self.tables.arrivals).release()
                    await settle()
            case "lose":
                self.log[self.told :] = [(GAP, None)]
                await self.tell(1)
            case "truncate":
                self.tables.content[T].clear()
                self.tables.time += 1
                self.log.append((Control("resync", T, "truncated"), None))
            case "take over":
                await self.take_over()
            case "replicate":
                self.replica = (copy.deepcopy(self.broker._index), self.told)
            case "fail over" if self.replica is not None:
                self.broker._index, self.told = self.replica
                self.replica = None
                await self.take_over()

    def write(self, changes: Sequence[tuple[int, int]]) -> None:
        """One transaction; what is written depends on its time, so that no two rows are alike."""
        self.tables.time += 1
        rows, time = self.tables.content[T], self.tables.time
        for ordinal, (key, what) in enumerate(changes):
            before, new = rows.get(str(key)), row(key, f"{time}.{ordinal}", LONG if what == 1 else "b")
            if before is None:
                rows[str(key)] = new
                self.log.append((insert(new, time), None))
            elif what == 0:
                del rows[str(key)]
                self.log.append((delete(key, time), before))
            elif what == 5 and str(key + 4) not in rows:  # it moves
                del rows[str(key)]
                rows[str(key + 4)] = moved = row(key + 4, *map(str, new[1:]))
                self.log.append((update(moved, time, old=key_only(key)), before))
            else:
                rows[str(key)] = new
                self.log.append((update(new, time), before))

    async def tell(self, count: int) -> None:
        news = self.log[self.told : self.told + count]
        for body, (told, true) in zip(await self.term.append(*(body for body, _ in news)), news, strict=True):
            if isinstance(told, Change) and body.old != told.old:
                assert body.old == short(true)
                self.completed += 1
        self.told += len(news)
        await settle()

    async def take_over(self) -> None:
        await self.term.end()
        self.term = Term(self.broker, self.tables)
        await self.begin()

    async def begin(self) -> None:
        await self.term.lead()
        await self.term.append()
        await settle()


def short(image: Image | None) -> Image | None:
    return None if image is None else tuple(ABSENT if value == LONG else value for value in image)


async def settle() -> None:
    """Let the seeding get as far as it can."""
    for _ in range(30):
        await asyncio.sleep(0)


@settings(max_examples=300)
@given(steps)
async def test_whatever_happens_an_old_row_is_the_true_one_or_is_not_told(plan: list[tuple[str, Any]]) -> None:
    world = World(MemoryBroker(**LIMITS))
    await world.begin()
    for name, argument in plan:
        await world.step(name, argument)
    await world.tell(len(world.log))
    await world.term.end()


async def test_in_the_end_every_old_row_is_known() -> None:
    world = World(MemoryBroker(**LIMITS))
    await world.begin()
    await world.step("lose", None)
    await world.step("read", 20)
    await world.step("arrive", 20)
    await world.term.seeded()
    world.write([(key, 2) for key in range(1, 5)])
    world.write([(key, 0) for key in range(1, 5)])
    await world.step("tell", 8)
    assert (world.completed, world.term.state.unknown) == (8, 0)
    await world.term.end()
