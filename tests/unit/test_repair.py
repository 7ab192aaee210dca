"""Repair: whatever was lost behind a doubt, copies end as the table is, or are told to be read again."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime_bridge import repair, seeding
from realtime_bridge.broker.base import NOTE
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Image, Relation
from realtime_bridge.errors import SourceError
from realtime_bridge.hub.subscription import form_of
from realtime_bridge.ingest import Ingest
from realtime_bridge.repair import RepairLimits
from realtime_bridge.row_versions import differs
from realtime_bridge.rows import Note
from realtime_bridge.sources.base import TEXT_BYTES, SourceBatch
from realtime_bridge.wire.native import Form
from tests.rights import Known
from tests.services import eventually
from tests.unit.test_rows import LIMITS, Tables, settle

POSTS = Relation(
    "public",
    "posts",
    (Column("id", "int8"), Column("owner", "text"), Column("body", "text"), Column("at", "int8")),
    (0,),
    full=False,
)
NOTES = replace(POSTS, table="notes")
T = POSTS.name
LONG = "x" * (TEXT_BYTES + 1)
GAP = Control("resync", "*", "upstream_gap")


def row(key: int, owner: str = "ada", body: str = "b", at: int = 1) -> Image:
    return str(key), owner, body, str(at)


def key_only(key: int) -> Image:
    return str(key), ABSENT, ABSENT, ABSENT


def insert(new: Image) -> Change:
    return Change("INSERT", POSTS, None, new, 1)


def update(new: Image) -> Change:
    return Change("UPDATE", POSTS, None, new, 1)


def delete(key: int) -> Change:
    return Change("DELETE", POSTS, key_only(key), None, 1)


FAILURE = SourceBatch()


class Script:
    """A source that tells what a test lets it tell."""

    name = "script"
    is_lossy = True

    def __init__(self) -> None:
        self.batches: asyncio.Queue[SourceBatch] = asyncio.Queue()

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator["Script"]:
        yield self

    async def check(self) -> None: ...

    def acknowledge(self, acknowledge: int) -> None: ...

    def __aiter__(self) -> AsyncIterator[SourceBatch]:
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[SourceBatch, None]:
        while True:
            batch = await self.batches.get()
            if batch is FAILURE:
                self.batches.task_done()
                raise SourceError("the test wants it")
            yield batch
            self.batches.task_done()

    async def fail(self) -> None:
        """End the stream; it can be opened again."""
        self.batches.put_nowait(FAILURE)
        await self.batches.join()


@dataclass
class Scene:
    """A leader that copies a script.

    Attributes:
        clock: time by every clock, as the test sets it.
    """

    broker: MemoryBroker
    tables: Tables
    ingest: Ingest
    source: Script
    clock: list[float] = field(default_factory=lambda: [1000.0])

    async def tell(self, *bodies: Body, doubts: Sequence[str] = ()) -> None:
        """Have the source tell something, and wait until it is appended."""
        self.source.batches.put_nowait(SourceBatch(bodies, ("",) * len(bodies), doubts=tuple(doubts)))
        await self.source.batches.join()

    async def prove(self) -> None:
        """Have the source prove everything up to now, and wait until that is appended; then time goes on."""
        self.clock[0] += 1
        self.source.batches.put_nowait(SourceBatch(proven_until=self.clock[0]))
        await self.source.batches.join()
        self.clock[0] += 1

    async def seeded(self) -> None:
        await self.tell()
        await self.prove()
        await eventually(lambda: self.ingest.state.rows.unread == 0)
        await self.prove()

    async def is_known(self) -> bool:
        """Whether all rows are in the index, as they are laid out now."""
        note = Note.decode((await self.broker.rows(T, [NOTE]))[0])
        return note is not None and note.relation == self.tables.relations[T] and note.whole_at > 0

    async def history(self) -> list[Any]:
        """Everything that all are told."""
        return [body for body in await self.everything() if not is_partial(body)]

    async def everything(self) -> list[Any]:
        return [entry.body for entry in await self.broker.read(0)]

    async def behind(self, number: int) -> list[Any]:
        """What the history holds behind so many entries, once nothing is in doubt any more."""
        await self.settled()
        return (await self.history())[number:]

    async def repaired(self) -> None:
        """Prove everything, as often as it takes."""
        async with asyncio.timeout(20):
            while self.ingest.state.repair.deadlines:
                await self.prove()
                await settle()

    async def settled(self) -> None:
        await eventually(lambda: not self.ingest.state.repair.deadlines)


def is_partial(body: Body) -> bool:
    """Whether it is told only to those who may have read the table in the gap."""
    return isinstance(body, Control) and body.since is not None


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_PAUSE_FIRST", 0.0)
    monkeypatch.setattr(seeding, "_PAUSE_MOST", 0.0)
    monkeypatch.setattr(repair, "_PAUSE", 0.0)


@asynccontextmanager
async def leading(
    monkeypatch: pytest.MonkeyPatch,
    *rows: Image,
    tables: Tables | None = None,
    most: int = 100,
    broker: MemoryBroker | None = None,
    is_seeded: bool = True,
) -> AsyncIterator[Scene]:
    """A leader; the rows are in the table from the beginning, and in the index if it is seeded."""
    tables = tables or Tables([POSTS])
    tables.put(*rows, table=T)
    broker, source = broker or MemoryBroker(**LIMITS), Script()
    ingest = Ingest(
        source,
        broker,
        tables,
        rights=Known(),
        tables=list(tables.relations),
        limits=RepairLimits("at", most),
        namespace="test",
        ttl=3600,
    )
    scene = Scene(broker, tables, ingest, source)
    clock = scene.clock
    fake = SimpleNamespace(
        time=lambda: clock[0], time_ns=lambda: int(clock[0] * 1e9), monotonic=asyncio.get_running_loop().time
    )
    monkeypatch.setattr(repair, "time", fake)
    monkeypatch.setattr(seeding, "time", fake)
    running = asyncio.create_task(ingest.run())
    try:
        if is_seeded:
            await scene.seeded()
        yield scene
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


def told(bodies: Sequence[Any]) -> list[tuple[str, Image | None, Image | None]]:
    """Operation, old and new row of changes that are marked."""
    assert all(isinstance(body, Change) and body.repaired for body in bodies)
    return [(body.operation, body.old, body.new) for body in bodies]


# -- what is told ------------------------------------------------------------------------------------------------------


async def test_rows_that_changed_came_or_went_in_a_gap_are_told_with_what_was_known_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = Tables([POSTS])
    tables.time = 10**18  # as a reader says that does not know the clock of the database well
    async with leading(monkeypatch, row(1), row(2), row(3), tables=tables) as scene:
        await scene.tell(insert(row(4)))
        scene.tables.content[T] = {"1": row(1), "2": row(2, "bob", at=3), "5": row(5, at=2)}
        await scene.tell(doubts=[T])
        await scene.prove()
        assert told(await scene.behind(1)) == [
            ("DELETE", row(3), None),
            ("DELETE", row(4), None),
            ("INSERT", None, row(5, at=2)),
            ("UPDATE", row(2), row(2, "bob", at=3)),
        ]
        assert (scene.ingest.state.repair.told, scene.ingest.state.repair.resyncs) == (4, 0)


async def test_what_was_repaired_is_known_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "bob", at=2), row(2))
        await scene.tell(doubts=[T])
        await scene.prove()
        await scene.behind(0)
        await scene.tell(delete(1), delete(2))
        assert [change.old for change in (await scene.history())[2:]] == [row(1, "bob", at=2), row(2)]


async def test_where_nothing_was_lost_nothing_is_told_and_no_proof_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1), row(2)) as scene:
        await scene.tell(update(row(2, "bob")))
        scene.tables.put(row(2, "bob"))
        await scene.tell(doubts=[T])
        assert await scene.behind(1) == []


async def test_nothing_is_told_before_what_was_read_is_passed_nor_proven_before_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        proven_until = (await scene.broker.head()).proven_until
        scene.tables.put(row(1, "bob", at=2))
        scene.tables.readings = 0
        await scene.tell(doubts=[T])
        await eventually(lambda: scene.tables.readings == 1)
        scene.source.batches.put_nowait(SourceBatch(proven_until=scene.clock[0] - 0.1))
        await scene.source.batches.join()
        await settle()
        assert ((await scene.history()), (await scene.broker.head()).proven_until) == ([], proven_until)
        await scene.prove()
        assert len(await scene.behind(0)) == 1
        await eventually(lambda: scene.ingest.state.repair.deadlines == {})
        assert (await scene.broker.head()).proven_until > proven_until


async def test_what_a_clock_proved_before_it_was_set_back_proves_nothing_of_what_is_read_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.clock[0] += 3600
        await scene.prove()
        scene.clock[0] -= 3600
        await scene.prove()
        scene.tables.put(row(1, "bob", at=2))
        scene.tables.readings = 0
        await scene.tell(doubts=[T])
        await eventually(lambda: scene.tables.readings == 1)
        await settle()
        assert await scene.history() == []
        await scene.prove()
        assert len(await scene.behind(0)) == 1


async def test_a_row_that_a_live_change_has_told_of_since_is_left_to_those(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1), row(2), row(3)) as scene:
        scene.tables.content[T] = {"1": row(1, "bob", at=2), "2": row(2, "bob", at=2), "4": row(4, at=2)}
        scene.tables.readings = 0
        await scene.tell(doubts=[T])
        await eventually(lambda: scene.tables.readings == 1)
        # Later than what was read: it stands in the table as well, by now.
        await scene.tell(update(row(1, "eve", at=3)), insert(row(3, at=3)), insert(row(5, at=3)), delete(4))
        await scene.prove()
        assert told(await scene.behind(3)) == [("UPDATE", row(2), row(2, "bob", at=2))]


async def test_while_a_table_is_in_doubt_the_old_row_is_the_one_that_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Change("UPDATE", POSTS, key_only(2), row(7, at=4), 1)
    async with leading(monkeypatch, row(1), row(2), row(3)) as scene:
        scene.tables.gate = asyncio.Semaphore(0)
        await scene.tell(update(row(4)), delete(5))
        await scene.tell(doubts=[T])
        await scene.tell(Change("UPDATE", POSTS, row(1, "eve"), row(1, "bob"), 1), insert(row(3, at=2)), moved)
        await scene.tell(update(row(8)), delete(8), delete(9))
        assert [(body.operation, body.old, body.new) for body in await scene.history()] == [
            ("UPDATE", None, row(4)),
            ("DELETE", key_only(5), None),
            ("UPDATE", row(1), row(1, "bob")),
            ("UPDATE", row(3), row(3, at=2)),
            ("DELETE", row(2), None),
            ("INSERT", None, row(7, at=4)),
            ("INSERT", None, row(8)),
            ("DELETE", row(8), None),
        ]


async def test_a_change_that_brings_not_all_of_a_row_in_doubt_is_read_back_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1, body=LONG)) as scene:
        scene.tables.gate = asyncio.Semaphore(0)
        await scene.tell(doubts=[T])
        scene.tables.put(row(1, "bob", body=LONG + "y", at=2))
        await scene.tell(Change("UPDATE", POSTS, None, ("1", "bob", ABSENT, "2"), 1))
        for _ in range(20):
            scene.tables.gate.release()
        await scene.repaired()
        short = ("1", "ada", ABSENT, "1")
        assert told(await scene.behind(0)) == [("UPDATE", short, row(1, "bob", body=LONG + "y", at=2))]


async def test_a_loss_is_not_hidden_by_what_is_told_of_its_row_before_the_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each row one change is lost, which changes the owner, ends the row, or edits what the next does not bring."""
    moved = Change("UPDATE", POSTS, key_only(5), row(4, "bob", at=3), 1)
    edited = Change("UPDATE", POSTS, key_only(6), ("6", "bob", ABSENT, "3"), 1)
    async with leading(monkeypatch, *map(row, range(1, 6)), row(6, body=LONG)) as scene:
        scene.tables.content[T] = {}
        scene.tables.put(row(1, "bob", "c", 3), row(3, "bob", at=3), row(4, "bob", at=3), row(6, "bob", LONG + "y", 3))
        await scene.tell(
            Change("UPDATE", POSTS, row(1, "bob", at=2), row(1, "bob", "c", 3), 10**9),
            Change("DELETE", POSTS, row(2, "bob", at=2), None, 10**9),
            *(replace(change, commit_time=10**9) for change in (insert(row(3, "bob", at=3)), moved, edited)),
        )
        assert [(body.operation, body.old, body.new) for body in await scene.history()] == [
            ("UPDATE", row(1), row(1, "bob", "c", 3)),
            ("DELETE", row(2), None),
            ("DELETE", row(3), None),
            ("INSERT", None, row(3, "bob", at=3)),
            ("DELETE", row(4), None),
            ("UPDATE", row(5), row(4, "bob", at=3)),
            ("UPDATE", ("6", "ada", ABSENT, "1"), ("6", "bob", ABSENT, "3")),
        ]
        await scene.tell(doubts=[T])
        await scene.repaired()
        short = ("6", "bob", ABSENT, "3")
        assert told(await scene.behind(7)) == [("UPDATE", short, row(6, "bob", LONG + "y", 3))]


async def test_who_may_have_read_the_table_in_the_gap_is_told_to_read_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        since = int((await scene.broker.head()).proven_until * 1_000_000)
        await scene.tell(doubts=[T])
        await scene.settled()
        [control] = await scene.everything()
        assert replace(control, commit_time=0) == Control("resync", T, "upstream_gap", since=since)
        await scene.tell(delete(1))
        assert (await scene.history())[0].old == row(1), "no row is forgotten by that"


async def test_a_table_that_is_doubted_again_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1), row(2)) as scene:
        scene.tables.put(row(1, "bob", at=2))
        scene.tables.readings = 0
        await scene.tell(doubts=[T])
        await eventually(lambda: scene.tables.readings == 1)
        await scene.tell(update(row(1, "eve", at=3)))
        scene.tables.put(row(1, "zoe", at=4), row(2, "zoe", at=4))
        await scene.tell(doubts=[T])
        await scene.prove()
        await eventually(lambda: scene.tables.readings >= 2)
        await scene.prove()
        assert told(await scene.behind(1)) == [
            ("UPDATE", row(1, "eve", at=3), row(1, "zoe", at=4)),
            ("UPDATE", row(2), row(2, "zoe", at=4)),
        ]


async def test_long_texts_are_told_apart_by_the_column_and_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    unversioned = ("4", "ada", LONG, None)
    async with leading(monkeypatch, row(1, body=LONG), row(2, body=LONG), row(3), unversioned) as scene:
        scene.tables.put(row(1, body=LONG + "y", at=2), row(3, body=LONG))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert {change.new for change in await scene.behind(0)} == {
            row(1, body=LONG + "y", at=2),
            row(3, body=LONG),
            unversioned,  # which cannot be told apart
        }


async def test_a_column_that_nobody_keeps_up_to_date_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1), row(2)) as scene:
        scene.tables.put(row(1, "bob"))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert told(await scene.behind(0)) == [("UPDATE", row(1), row(1, "bob"))]


@pytest.mark.parametrize(
    ("type_", "told_text", "text", "is_other"),
    [
        ("jsonb", '{"a":[1,null],"b":1.5}', '{"b": 1.50, "a": [1, null]}', False),
        ("jsonb", '{"a":1}', '{"a": true}', True),
        ("json", "[1", "[1]", True),
        ("numeric", "1.5", "1.50", False),
        ("numeric", "NaN", "NaN", False),
        ("numeric", "1.5", "1.51", True),
        ("text", "1.5", "1.50", True),
        ("text", None, "", True),
        ("text", None, None, False),
    ],
)
def test_values_that_json_changes_on_its_way_are_compared_by_what_they_mean(
    type_: str, told_text: str | None, text: str | None, is_other: bool
) -> None:
    relation = replace(POSTS, columns=(Column("id", "int8"), Column("at", "int8"), Column("value", type_)))
    assert differs(relation, "at", ("1", "1", told_text), ("1", "1", text)) is is_other


# -- what cannot be proven ---------------------------------------------------------------------------------------------


UNREADABLE = "unreadable"


class Unreadable(Tables):
    """A reader that does not get at one value."""

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        found = await super().rows(relation, keys)
        return [tuple(ABSENT if value == UNREADABLE else value for value in image) for image in found]


async def unreadable(scene: Scene) -> None:
    scene.tables.put(row(1, UNREADABLE))


async def faulty(scene: Scene) -> None:
    del scene.tables.relations


async def unseeded(scene: Scene) -> None:
    scene.tables.problem = "not yet"
    await scene.tell(Change("INSERT", replace(POSTS, full=True), None, row(3), 1), insert(row(3)))
    scene.tables.problem = ""


async def seeded_anew(scene: Scene) -> None:
    """The reading is later than what was proven last: a change between the two may be missing."""
    before = scene.tables.readings
    await scene.tell(Change("INSERT", replace(POSTS, full=True), None, row(3), 1), insert(row(3)))
    await eventually(lambda: scene.tables.readings > before)
    await settle()


async def broken(scene: Scene) -> None:
    scene.tables.problem = "Postgres cannot be reached"


async def grown(scene: Scene) -> None:
    scene.tables.put(*(row(n) for n in range(4)))


async def shrunk_from_much(scene: Scene) -> None:
    await scene.tell(*(insert(row(n)) for n in range(4, 12)))


async def emptied_of_much(scene: Scene) -> None:
    await shrunk_from_much(scene)
    scene.tables.content[T].clear()


async def changed_much(scene: Scene) -> None:
    scene.tables.put(*(row(n, "bob") for n in range(3)))


async def changed_long(scene: Scene) -> None:
    scene.tables.put(row(1, body="x" * 1000))


async def reshaped(scene: Scene) -> None:
    scene.tables.relations[T] = replace(POSTS, columns=(*POSTS.columns, Column("mood", "text")))


async def unkeyed(scene: Scene) -> None:
    scene.tables.relations[T] = replace(POSTS, key=())
    await scene.tell(Change("INSERT", scene.tables.relations[T], None, row(9), 1))


async def left_out(scene: Scene) -> None:
    await scene.tell(insert(row(9, body="x" * 200)))


PROBLEMS = [
    (faulty, "AttributeError"),
    (unseeded, "not all of its rows"),
    (seeded_anew, "after the last proof"),
    (unreadable, "cannot be read back"),
    (broken, "Postgres cannot be reached"),
    (grown, "more than 3 rows"),
    (shrunk_from_much, "more than 3 rows"),
    (emptied_of_much, "more than 3 rows"),
    (changed_much, "more than 2 of its rows"),
    (changed_long, "too much of it"),
    (reshaped, "columns have changed"),
    (unkeyed, "no primary key"),
    (left_out, "no room"),
]


@pytest.mark.parametrize(("problem", "reason"), PROBLEMS, ids=lambda one: getattr(one, "__name__", ""))
async def test_what_cannot_be_proven_is_one_resync_and_says_why(
    problem: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(repair, "MOST_CHANGED", 2)
    monkeypatch.setattr(repair, "MOST_BYTES", 500)
    broker = MemoryBroker(**{**LIMITS, "row_index_bytes": 500 if problem is left_out else 5000})
    async with leading(monkeypatch, row(1), row(2), tables=Unreadable([POSTS]), most=3, broker=broker) as scene:
        await problem(scene)
        before = len(await scene.history())
        await scene.tell(doubts=[T])
        found = await scene.behind(before)
        assert [replace(body, commit_time=0) for body in found] == [GAP]
        [warning] = [record for record in caplog.records if record.message == "not read back after a gap"]
        assert reason in warning.__dict__["reason"]
        assert scene.ingest.state.repair.resyncs == 1


async def test_why_a_table_is_not_repaired_is_logged_once_until_it_is_another_reason_or_it_was_repaired(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = replace(POSTS, columns=POSTS.columns[:3])
    async with leading(monkeypatch, tables=Tables([plain])) as scene:
        for number, relation in enumerate((plain, plain, POSTS, plain, POSTS, plain)):
            scene.tables.relations[T] = relation
            if relation is POSTS:
                await scene.tell(insert(row(1)))
                scene.tables.put(row(1))
                await eventually(scene.is_known)
                await scene.prove()
            if number == 1:
                await scene.source.fail()  # the next term knows what was logged
            await scene.tell(doubts=[T])
            await scene.settled()
    warnings = [record for record in caplog.records if record.message == "not read back after a gap"]
    reasons = ["it has no column at", *["its columns have changed"] * 2]
    assert [warning.__dict__["reason"] for warning in warnings] == reasons


async def test_what_was_not_lost_is_settled_without_a_proof_and_each_table_waits_for_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = replace(POSTS, table="other")
    tables = Tables([POSTS, NOTES, other])
    for relation in tables.relations.values():
        tables.put(row(1), table=relation.name)
    async with leading(monkeypatch, tables=tables) as scene:
        tables.put(row(1, "bob"))
        tables.put(row(1, "bob"), table=NOTES.name)
        now, deadlines = asyncio.get_running_loop().time(), scene.ingest.state.repair.deadlines
        deadlines |= {T: now + 0.5, NOTES.name: now + 3600, other.name: now + 3600}
        await scene.tell(doubts=list(tables.relations))
        await eventually(lambda: set(deadlines) == {T, NOTES.name})
        await eventually(lambda: set(deadlines) == {NOTES.name})
        await scene.repaired()
        resync, change = await scene.history()
        assert replace(resync, commit_time=0) == Control("resync", T, "upstream_gap")
        assert (change.relation, change.new) == (NOTES, row(1, "bob"))


async def test_one_table_that_cannot_be_repaired_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables([POSTS, NOTES, replace(POSTS, table="plain", columns=POSTS.columns[:3])])
    tables.put(row(1), table=NOTES.name)
    async with leading(monkeypatch, row(1), tables=tables) as scene:
        tables.put(row(1, "bob"), table=NOTES.name)
        await scene.tell(doubts=list(tables.relations))
        await eventually(lambda: scene.ingest.state.repair.resyncs)
        await eventually(lambda: set(scene.ingest.state.repair.deadlines) == {NOTES.name})  # which waits for a proof
        await scene.prove()
        resync, change = await scene.behind(0)
        assert replace(resync, commit_time=0) == Control("resync", "public.plain", "upstream_gap")
        assert (change.relation, change.new) == (NOTES, row(1, "bob"))


@pytest.mark.parametrize("stuck", ["reading", "proof"])
async def test_a_repair_that_does_not_come_to_an_end_is_a_resync(monkeypatch: pytest.MonkeyPatch, stuck: str) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        monkeypatch.setattr(repair, "REPAIR_SECONDS", 0.05)
        scene.tables.put(row(1, "bob"))
        if stuck == "reading":
            scene.tables.gate = asyncio.Semaphore(0)
        await scene.tell(doubts=[T])
        assert [replace(body, commit_time=0) for body in await scene.behind(0)] == [GAP]


async def test_leaders_that_follow_each_other_do_not_put_off_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "bob"))
        await scene.tell(doubts=[T])
        [deadline] = scene.ingest.state.repair.deadlines.values()
        await scene.source.fail()
        await scene.tell(doubts=[T])
        assert list(scene.ingest.state.repair.deadlines.values()) == [deadline]
        await scene.prove()
        assert len(told(await scene.behind(0))) == 1


async def test_a_doubt_that_another_leader_has_taken_over_meanwhile_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "bob"))
        long_ago = asyncio.get_running_loop().time() - 3600
        scene.ingest.state.repair.deadlines[T] = long_ago
        await scene.tell(doubts=[T])
        await scene.prove()
        assert len(told(await scene.behind(0))) == 1


async def test_a_term_that_ends_in_the_middle_of_a_repair_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = MemoryBroker(**LIMITS)
    async with leading(monkeypatch, row(1), broker=broker) as scene:
        tables, clock = scene.tables, scene.clock[0]
        tables.put(row(1, "bob", at=2))
        await scene.tell(doubts=[T])
        await scene.prove()  # may be told now, or not
    async with leading(monkeypatch, tables=tables, broker=broker, is_seeded=False) as scene:
        scene.clock[0] = clock + 10
        await scene.tell(doubts=[T])
        await scene.prove()
        await scene.settled()
        assert told(await scene.history()) == [("UPDATE", row(1), row(1, "bob", at=2))]


# -- a source that is further behind than it takes for proven ----------------------------------------------------------


async def test_what_is_older_than_what_was_read_back_is_not_told_but_is_another_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1), row(2)) as scene:
        scene.tables.put(row(1, "bob", at=5), row(2, "bob", at=5))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert len(await scene.behind(0)) == 2
        scene.tables.readings = 0
        await scene.tell(update(row(1, "eve", at=4)))
        await eventually(lambda: scene.tables.readings == 1)
        assert await scene.behind(2) == []
        newer = [update(row(1, "zoe", at=6)), update(row(1, "bob", at=5)), delete(2)]
        await scene.tell(*newer)
        assert [change.new for change in await scene.behind(2)] == [row(1, "zoe", at=6), row(1, "bob", at=5), None]


async def test_what_is_no_older_than_what_was_read_back_is_told_and_is_no_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is like it as far as anybody can tell: of long texts the row index has nothing to compare."""
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "x" * 300, at=5))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert len(await scene.behind(0)) == 1
        live = [row(1, "y" * 300, at=5), row(1, "y" * 300, at=5)]
        await scene.tell(*map(update, live))
        await scene.prove()
        assert [change.new for change in await scene.behind(1)] == live


async def test_a_row_that_is_made_again_just_as_it_was_read_back_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "bob", at=5))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert len(await scene.behind(0)) == 1
        await scene.tell(delete(1), insert(row(1, "bob", at=5)))
        await scene.prove()
        deleted, made = await scene.behind(1)
        assert (deleted.old, made.operation, made.new) == (row(1, "bob", at=5), "INSERT", row(1, "bob", at=5))


async def test_rows_that_are_laid_out_otherwise_are_not_compared_with_what_was_read_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(monkeypatch, row(1)) as scene:
        scene.tables.put(row(1, "bob", at=5))
        await scene.tell(doubts=[T])
        await scene.prove()
        assert len(await scene.behind(0)) == 1
        other = replace(POSTS, columns=POSTS.columns[:3])
        await scene.tell(Change("UPDATE", other, None, row(1, "eve")[:3], 1))
        assert [change.new for change in await scene.behind(1)] == [row(1, "eve")[:3]]


# -- whatever happens --------------------------------------------------------------------------------------------------

keys = st.integers(1, 3)
writes = st.lists(st.tuples(st.sampled_from(["write", "write", "delete", "move", "edit"]), keys), max_size=4)
deliveries = st.lists(st.tuples(st.just("deliver"), st.integers(1, 5)), max_size=2)


def only(*names: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(names), st.just(0)), max_size=2)


rounds = st.tuples(
    *(writes, deliveries, only("join", "prove")),
    *(st.just([("lose", 0)]), writes, deliveries, only("join"), writes, deliveries),
    *(only("hear"), writes, deliveries, only("join")),
    *(st.just([("doubt", 0)]), only("wait", "doubt"), writes, deliveries, only("wait", "prove")),
    *(writes, deliveries, only("wait", "prove")),
).map(chain.from_iterable)
"""Nothing in a round has to be, but a loss and a doubt behind it, in that order; what is told between may be heard."""

WHOLE, KEY, NOTHING = "whole", "key", "nothing"


@dataclass
class Reader:
    """One that read the table at some time, and folds what it is told from then on. It sees the rows of one owner.

    Attributes:
        number: of the entry that was the newest then.
        time: when that was.
    """

    owner: str
    copy: dict[str, Image]
    number: int
    time: float
    newest: dict[str, int] = field(default_factory=dict)

    def sees(self, image: Image | None) -> bool | None:
        """As a policy that compares the owner decides."""
        if image is None:
            return False
        return None if image[1] is ABSENT else image[1] == self.owner

    def fold(self, change: Change, *, is_sloppy: bool) -> bool:
        """Whether it can: it is told to read the table again otherwise."""
        before, after = change.images()
        form = form_of(change, self.sees(before), self.sees(after))
        if form is None:
            return True
        if not isinstance(form, Form):
            return False
        known = None if before is None or form is Form.INSERT else self.copy.pop(str(before[0]), None)
        if change.new is None or form is Form.LEAVE:
            return True
        key, version = str(change.new[0]), int(str(change.new[3]))
        is_again = is_sloppy or change.repaired  # a row that was not brought whole before
        assert version > self.newest.get(key, 0) or (is_again and version == self.newest[key])
        self.newest[key] = version
        pairs = zip(known or change.new, change.new, strict=True)
        self.copy[key] = tuple(one if other is ABSENT else other for one, other in pairs)
        return True


class Lossy:
    """A table, and a source that is behind it and loses what it is to deliver while it is lossy.

    A gap lasts from a loss to its doubt; the source may be heard again before that.

    Args:
        brings: how much of old rows the source brings.
    """

    def __init__(self, scene: Scene, *, is_sloppy: bool, brings: str) -> None:
        self.scene = scene
        self.late: list[Change] = []
        self.is_lossy = self.is_gap = False
        self.is_sloppy = is_sloppy
        self.brings = brings
        self.version = 1
        self.readers: list[Reader] = []
        self.join()

    def join(self) -> None:
        """Somebody reads the table."""
        number = self.scene.broker._number
        for owner in ("ada", "bob"):
            rows = {key: row for key, row in self.scene.tables.content[T].items() if row[1] == owner}
            self.readers.append(Reader(owner, rows, number, self.scene.clock[0]))

    async def step(self, name: str, argument: int) -> None:
        match name:
            case "deliver":
                news, self.late = self.late[:argument], self.late[argument:]
                if not self.is_lossy:
                    await self.scene.tell(*news)
            case "lose" | "hear":
                self.is_lossy, self.is_gap = name == "lose", True
            case "doubt":
                self.is_lossy = self.is_gap = False
                await self.scene.tell(doubts=[T])
            case "prove":
                if not self.is_gap and (self.is_sloppy or not self.late):
                    await self.scene.prove()
            case "wait":
                await settle()
            case "join":
                if not self.is_sloppy:  # or what is proven says nothing of what was read
                    self.join()
            case _:
                self.commit(name, argument)

    def commit(self, name: str, key: int) -> None:
        """What is written depends on its time: the owner, and whether the body is a long one."""
        self.version += 1
        content, before = self.scene.tables.content[T], self.scene.tables.content[T].get(str(key))
        owner, body = ("ada", "bob")[self.version % 2], LONG + str(self.version) if self.version % 3 else "b"
        new = row(key, owner, body, self.version)
        if before is None:
            if name == "write":
                content[str(key)] = new
                self.late.append(insert(new))
            return
        old = {WHOLE: before, KEY: key_only(key), NOTHING: None}[self.brings]
        del content[str(key)]
        if name == "delete":
            self.late.append(replace(delete(key), old=old or key_only(key)))
            return
        if name == "move":
            new = (str(key % 3 + 1), *new[1:])
            if str(new[0]) in content:
                content[str(key)] = before
                return
            old = old or key_only(key)
        told = new
        if name == "edit":  # which leaves the body as it is: a long one is not brought
            new = (*new[:2], before[2], new[3])
            told = (*new[:2], ABSENT, new[3]) if len(str(before[2])) > TEXT_BYTES and old is not before else new
        content[str(new[0])] = new
        self.late.append(replace(update(told), old=old))

    async def end(self) -> None:
        """Whatever was lost is noticed at last, and everything else delivered; a sloppy source may notice even then."""
        await self.step("doubt", 0)
        await self.step("deliver", len(self.late))
        await self.scene.repaired()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rounds.map(list), min_size=1, max_size=4), st.booleans(), st.sampled_from([WHOLE, KEY, NOTHING]))
async def test_whatever_is_lost_copies_end_as_the_table_is_and_no_row_goes_back_in_time(
    monkeypatch: pytest.MonkeyPatch, plan: list[list[tuple[str, int]]], is_sloppy: bool, brings: str
) -> None:
    async with leading(monkeypatch, row(1), row(2)) as scene:
        world = Lossy(scene, is_sloppy=is_sloppy, brings=brings)
        await scene.prove()
        for name, argument in chain.from_iterable(plan):
            await world.step(name, argument)
        await world.end()
        for reader in world.readers:
            for body in (await scene.everything())[reader.number :]:
                if isinstance(body, Change):
                    if not reader.fold(body, is_sloppy=is_sloppy):
                        break
                elif body.since is None:
                    pytest.fail("a resync for all")
                elif body.since < reader.time * 1_000_000:
                    break  # it reads the table again
            else:
                assert reader.copy == {k: row for k, row in scene.tables.content[T].items() if row[1] == reader.owner}
