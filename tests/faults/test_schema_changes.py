"""A table is changed, replaced, left out of the publication and taken in again, while it is followed and written to.

Afterwards every copy is what `SELECT` shows its user, and meanwhile nobody was shown what was not for it.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import asyncpg
import pytest

from realtime_bridge.dev.schema import SCHEMA
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Message, read_posts
from tests.integration.test_copies import CheckedCopy, truth
from tests.services import eventually
from tests.steady import ADA, checks, follow_for_ever
from tests.ways import Way

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(240)]

BOB = "00000000-0000-0000-0000-000000000002"
PUBLISH = f"alter publication {PUBLICATION} add table posts"

GONE = "it is gone"
STEPS: Mapping[str, str] = {
    "a column is added": "alter table posts add column mood text not null default 'calm'",
    "and renamed": "alter table posts rename column mood to temper",
    "has no default": "alter table posts alter column temper drop default, alter column temper drop not null",
    "gets another type": "alter table posts alter column temper type jsonb using to_jsonb(temper)",
    "and is dropped": "alter table posts drop column temper",
    "a column that the policy reads gets another name": "alter table posts rename column is_public to is_open",
    "and its old one again": "alter table posts rename column is_open to is_public",
    "the key gets another type": "alter table posts alter column id type int",
    "the key is named otherwise": "alter table posts drop constraint posts_pkey, add constraint other primary key (id)",
    "all is rewritten": "cluster posts using other",
    "nothing is protected": "alter table posts disable row level security",
    "and all is again": "alter table posts enable row level security",
    "the table is made anew": f"drop table posts; {SCHEMA}; {PUBLISH}",
    "another takes its place": f"alter table posts rename to former; {SCHEMA}; {PUBLISH}; drop table former",
    "it is not published": f"alter publication {PUBLICATION} drop table posts",
    "and is again": PUBLISH,
    GONE: "drop table posts",
    "and there again": f"{SCHEMA}; {PUBLISH}",
}
UNREADABLE = {"it is not published", GONE}
"""What the bridge says of itself that it is not ready for."""
UNTOLD = {*UNREADABLE, "nothing is protected"}
"""Nothing is told until the next step."""


@asynccontextmanager
async def connected(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection that remembers nothing of tables that may be others soon."""
    connection = await asyncpg.connect(database, statement_cache_size=0)
    try:
        yield connection
    finally:
        await connection.close()


class Writer:
    """Makes posts of two users, changes and deletes them, whenever the table lets it."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.written = 0
        self._connection = connection
        self._chance = random.Random(5)
        self._goes_on = asyncio.Event()
        self._rests = asyncio.Event()

    async def run(self) -> None:
        while True:
            if not self._goes_on.is_set():
                self._rests.set()
                await self._goes_on.wait()
            try:
                await self._write()
                self.written += 1
            except asyncpg.PostgresError:
                pass  # the table is being changed
            await asyncio.sleep(0.005)

    async def _write(self) -> None:
        some = "id = (select id from posts order by random() limit 1)"
        kind = self._chance.choice(["insert", "insert", "update", "move", "delete"])
        sql = {
            "insert": f"insert into posts (user_id, title) values ('{self._chance.choice([ADA, BOB])}', 'new')",
            "update": f"update posts set title = title || '.' where {some}",
            "move": f"update posts set user_id = '{self._chance.choice([ADA, BOB])}' where {some}",
            "delete": f"delete from posts where {some}",
        }[kind]
        await self._connection.execute(sql)

    @asynccontextmanager
    async def writing(self, *, before: bool) -> AsyncIterator[None]:
        """Write a few rows before the block, if there is where to, and some behind it; rest afterwards."""
        self._rests.clear()
        self._goes_on.set()
        if before:
            await self._more()
        yield
        await self._more()
        self._goes_on.clear()
        await self._rests.wait()

    async def _more(self, rows: int = 20) -> None:
        goal = self.written + rows
        await eventually(lambda: self.written >= goal, 30)


class Reader(CheckedCopy):
    """A copy that reads the table in the database, as its user."""

    def __init__(self, url: str, user: str, database: str) -> None:
        super().__init__(url, user)
        self._database = database

    def may_see(self, image: Message) -> bool:
        return image["user_id"] == self.user or bool(image.get("is_public", image.get("is_open")))

    async def begin(self) -> None:
        """Read the table, and know from where to follow it."""
        _, self.position = await read_posts(self.url, self.token)
        await self.load()

    async def load(self) -> None:
        while True:
            try:
                self.rows = await truth(self._database, self.user)
                return
            except asyncpg.UndefinedTableError:
                await asyncio.sleep(0.1)  # as a client does that cannot read

    async def difference(self) -> str:
        """How the copy differs from what the user is shown; empty if it does not."""
        shown = await truth(self._database, self.user)
        wrong = [key for key in shown | self.rows if shown.get(key) != self.rows.get(key)]
        return "; ".join(f"{self.rows.get(key)} instead of {shown.get(key)}" for key in wrong[:3])

    async def comes_right(self) -> bool:
        async def is_right() -> bool:
            return not await self.difference()

        with suppress(AssertionError):
            return await eventually(is_right, 30)
        return False


@pytest.mark.parametrize(
    ("way", "identity"), [("postgres-memory", "full"), ("postgres-valkey", "default")], indirect=["way"]
)
async def test_whatever_is_done_to_a_table_copies_come_to_what_select_shows(way: Way, identity: str) -> None:
    async with AsyncExitStack() as stack:
        bridge = await stack.enter_async_context(way.bridge(BRIDGE_RESYNC_SECONDS="0.2"))
        changing, writing = [await stack.enter_async_context(connected(way.database)) for _ in range(2)]
        await changing.execute(f"alter table posts replica identity {identity}")
        copies = [Reader(bridge.url, user, way.database) for user in (ADA, BOB)]
        for copy in copies:
            await copy.begin()
        writer = Writer(writing)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        working = [tasks.create_task(follow_for_ever(copy)) for copy in copies]
        working.append(tasks.create_task(writer.run()))
        for former, (step, sql) in zip(["", *STEPS], STEPS.items(), strict=False):
            sql = sql.replace("replica identity full", f"replica identity {identity}")
            if step in UNREADABLE:
                await changing.execute(sql)
                await eventually(partial(checks, bridge), 30)
                continue
            async with writer.writing(before=former != GONE):
                await changing.execute(sql)
            for copy in copies:
                assert step in UNTOLD or await copy.comes_right(), f"{step}: {await copy.difference()}"
        await eventually(partial(is_ready, bridge), 30)
        async with writer.writing(before=True):
            pass
        for copy in copies:
            assert await copy.comes_right(), await copy.difference()
        for task in working:
            task.cancel()


async def is_ready(bridge: BridgeProcess) -> bool:
    return not await checks(bridge)
