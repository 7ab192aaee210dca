"""Everything that Supabase does wrong, under a steady writer, through a bridge that is never restarted.

Before each fault it drops changes in silence, which a source that only listens does not notice; the fault makes it
look.
"""

import asyncio
import json
import random
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeAlias

import asyncpg
import pytest

from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.hub import subscription
from tests.bridges import BridgeProcess
from tests.clients import Copy, Message, http
from tests.integration.test_supabase_source import connected, consumed
from tests.services import SECRET, eventually, token
from tests.steady import metric, proven

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.timeout(120),
]

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
SERVICE_KEY = token(None, role="service_role")
ANON_KEY = token(None, role="anon")
FLOWS_WITHIN = 30.0
READ_SECONDS = 1.0


def take_copies_for_read() -> None:
    """Planted in bridges: readers who have begun so long ago have read the tables."""
    subscription.LOAD_SECONDS = READ_SECONDS  # type: ignore[misc]


class SteadyWriter:
    """Inserts posts of both users, changes and deletes them; each change has a `body` greater than any before it.

    Attributes:
        may_insert: a row that was made unheard and is changed before anybody notices is a resync to whom it is hidden.
    """

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.version = 0
        self.may_insert = True
        self._connection = connection
        self._rows: list[int] = []
        self._dice = random.Random(7)
        self._stop = asyncio.Event()

    async def run(self) -> None:
        while not self._stop.is_set():
            self.version += 1
            if len(self._rows) < 12 and self.may_insert:
                await self._insert(self._dice.choice([ADA, BOB]))
            elif self._dice.random() < 0.1:
                row = self._rows.pop(self._dice.randrange(len(self._rows)))
                await self._connection.execute("delete from posts where id = $1", row)
            else:
                row, is_public = self._dice.choice(self._rows), self._dice.random() < 0.5
                sql = "update posts set body = $2, is_public = $3 where id = $1"
                await self._connection.execute(sql, row, str(self.version), is_public)
            await asyncio.sleep(0.02)

    async def _insert(self, user: str) -> None:
        sql = "insert into posts (user_id, title, body, is_public) values ($1, 'x', $2, true) returning id"
        self._rows.append(await self._connection.fetchval(sql, user, str(self.version)))

    def stop(self) -> None:
        self._stop.set()


@dataclass
class Scene:
    """A local Supabase, a bridge over it, a writer, and two clients.

    Attributes:
        bridge: of the clients.
        leader: another one that leads, where they share a Redis; else the same.
        titles: of the rows that both clients see at first.
    """

    supabase: LocalSupabase
    bridge: BridgeProcess
    leader: BridgeProcess
    database: str
    writer: SteadyWriter
    copies: "list[OwnCopy]"
    titles: dict[int, str]

    def newest(self, copy: Copy) -> int:
        """The newest version that a client was sent live."""
        return max((int(m["record"]["body"]) for m in copy.history if "record" in m), default=0)

    async def flows(self) -> None:
        """Wait until every client is sent what is written from now on."""
        now = self.writer.version
        await eventually(lambda: all(self.newest(copy) > now for copy in self.copies), FLOWS_WITHIN)

    async def seeded(self) -> None:
        """Wait until it is proven that rows, and clients' copies, were read before anything was missing."""
        await eventually(lambda: "row index seeded" in self.leader.log, FLOWS_WITHIN)
        await proven(self.bridge, READ_SECONDS)

    async def told(self) -> None:
        """Wait until every client was told of what it has missed."""
        await eventually(lambda: all(any(map(is_repaired, copy.history)) for copy in self.copies), FLOWS_WITHIN)

    async def problem(self) -> str:
        """Why the bridge says that it is not ready; empty if it is."""
        async with http(self.bridge.url) as client:
            upstream = (await client.get("/readyz")).json()["checks"]["upstream"]
        return "" if upstream["ok"] else str(upstream["reason"])

    async def lose(self) -> None:
        """Delete a row, make another, and hide one from Bob, while no change is told, and nobody notices."""
        self.writer.may_insert = False
        self.supabase.drop(sys.maxsize)
        async with connected(self.database) as connection:
            await connection.execute("insert into posts (user_id, title, body) values ($1, 'in the gap', '0')", ADA)
            await connection.execute("delete from posts where title = 'before'")
            await connection.execute("update posts set is_public = false, body = '1' where title = 'hidden'")
            await consumed(connection)
        self.supabase.drop(0)
        self.writer.may_insert = True

    async def ends_well(self) -> None:
        """Copies equal the table as their users see it, and no row went back in time."""
        self.writer.stop()
        for copy in self.copies:
            await eventually(partial(self._is_equal, copy))
            assert versions_in_order(copy.history)

    def gone(self, copy: Copy) -> dict[str, bool]:
        """What was read back of rows that are there no more for a client, by title: whether they have only left it."""
        deleted = [message for message in copy.history if message["type"] == "DELETE" and is_repaired(message)]
        titles = [self.titles.get(message["old_record"]["id"]) for message in deleted]
        return {title: "left" in message for title, message in zip(titles, deleted, strict=True) if title}

    async def _is_equal(self, copy: "OwnCopy") -> bool:
        return copy.rows == await copy.read()


def is_repaired(message: Message) -> bool:
    return "repaired" in message


def versions_in_order(history: list[Message]) -> bool:
    """Whether each row's versions, as they were sent, only grow: nothing older, and nothing twice."""
    versions: dict[int, list[int]] = defaultdict(list)
    for message in history:
        if "record" in message:
            versions[message["record"]["id"]].append(int(message["record"]["body"]))
    return all(one < other for row in versions.values() for one, other in pairwise(row))


class OwnCopy(Copy):
    """A copy for where the bridge has no database: the user reads the table elsewhere."""

    def __init__(self, url: str, user: str, database: str) -> None:
        super().__init__(url, token(user))
        self._user = user
        self._database = database

    async def load(self) -> None:
        self.rows = await self.read()

    async def read(self) -> dict[int, Message]:
        async with connected(self._database) as connection:
            sql = "select to_jsonb(p) from posts p where user_id = $1 or is_public"
            await connection.execute("set timezone = 'UTC'")
            rows = [json.loads(row[0]) for row in await connection.fetch(sql, self._user)]
            return {row["id"]: row for row in rows}


@asynccontextmanager
async def scene(database: str, namespace: str, *, has_database: bool = True, **given: str) -> AsyncIterator[Scene]:
    """Everything running, and rows `before` and `hidden` that both users see.

    Args:
        has_database: whether the bridge has DATABASE_URL.
        given: settings beside the usual.
    """
    connection = await asyncpg.connect(database)
    insert = "insert into posts (user_id, title, body, is_public) values ($1, $2, '0', true)"
    await connection.executemany(insert, [(ADA, "before"), (ADA, "hidden")])
    settings = {"BRIDGE_SOURCE": "supabase", "BRIDGE_RESYNC_SECONDS": "1", "BRIDGE_NAMESPACE": namespace, **given}
    await connection.execute("create table canary (id text primary key, beat bigint not null)")
    async with LocalSupabase(
        database,
        jwt_secret=SECRET,
        service_key=SERVICE_KEY,
        anon_key=ANON_KEY,
        tables=["public.posts", "public.canary"],
    ) as supabase:
        settings |= {"SUPABASE_URL": supabase.url, "SUPABASE_KEY": SERVICE_KEY}
        dsn = database if has_database else ""
        async with AsyncExitStack() as stack:
            bridges = [BridgeProcess(dsn, **settings) for _ in range(2 if "REDIS_URL" in given else 1)]
            for bridge in bridges:
                bridge.plant = take_copies_for_read
                await stack.enter_async_context(bridge)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            copies = [OwnCopy(bridge.url, user, database) for user in (ADA, BOB)]
            writer = SteadyWriter(connection)
            following = [tasks.create_task(copy.follow(), name="client") for copy in copies]
            for copy in copies:
                await eventually(partial(getattr, copy, "position"))
                await copy.load()
            titles = {key: row["title"] for key, row in copies[0].rows.items()}
            made = Scene(supabase, bridges[-1], bridges[0], database, writer, copies, titles)
            writing = tasks.create_task(writer.run(), name="writer")
            await made.flows()
            assert all(copy.resyncs == [] for copy in copies)
            yield made
            writer.stop()
            await writing
            for one in following:
                one.cancel()
    await connection.close()


Fault: TypeAlias = Callable[[Scene], Coroutine[Any, Any, None]]


# -- faults: each lasts, and is over when it returns -----------------------------------------------------------------


async def is_restarted(scene: Scene) -> None:
    await scene.supabase.restart(2)


async def closes_connections(scene: Scene) -> None:
    await scene.supabase.close(1012)


async def freezes_until_given_up(scene: Scene) -> None:
    scene.supabase.freeze()

    async def is_given_up() -> bool:
        return "heartbeat" in await scene.problem()

    await eventually(is_given_up, 15)
    scene.supabase.thaw()


async def sends_a_frame_too_large(scene: Scene) -> None:
    scene.supabase.oversize()


async def closes_the_channel(scene: Scene) -> None:
    scene.supabase.phx_close()


async def reports_an_error(scene: Scene) -> None:
    scene.supabase.system_error()


async def ends_the_token(scene: Scene) -> None:
    scene.supabase.refuse_joins("InvalidJWTToken: Token has expired 12 seconds ago")
    scene.supabase.system_error("Token has expired 12 seconds ago")
    scene.supabase.phx_close()
    await eventually(lambda: "Token has expired" in scene.bridge.log)
    scene.supabase.refuse_joins(None)


async def answers_no_join(scene: Scene) -> None:
    scene.supabase.ignore_joins()
    await scene.supabase.close(1011)
    await asyncio.sleep(1.5)  # how long it lasts
    scene.supabase.ignore_joins(ignored=False)


async def subscribes_again(scene: Scene) -> None:
    scene.supabase.resubscribe()


LOSING: list[Fault] = [
    is_restarted,
    closes_connections,
    freezes_until_given_up,
    sends_a_frame_too_large,
    closes_the_channel,
    reports_an_error,
    ends_the_token,
    answers_no_join,
    subscribes_again,
]


@pytest.mark.parametrize("fault", LOSING, ids=lambda fault: str(fault.__name__))
async def test_a_supabase_that(fault: Fault, database: str, namespace: str) -> None:
    """… costs nobody a row: what was missed is told to exactly those who saw or see it, and everything flows again."""
    async with scene(database, namespace) as scene_:
        await scene_.seeded()
        await scene_.lose()
        await fault(scene_)
        await scene_.told()
        await scene_.flows()
        await eventually(lambda: is_ready(scene_))
        await scene_.ends_well()
        assert [copy.resyncs for copy in scene_.copies] == [[], []]
        assert [scene_.gone(copy) for copy in scene_.copies] == [{"before": False}, {"before": False, "hidden": True}]


async def test_what_a_dead_leader_has_missed_its_successor_tells(database: str, namespace: str, redis_url: str) -> None:
    async with scene(database, namespace, REDIS_URL=redis_url) as scene_:
        await scene_.seeded()
        await scene_.lose()
        scene_.leader.kill()
        await scene_.told()
        await scene_.flows()
        await scene_.ends_well()
        assert [copy.resyncs for copy in scene_.copies] == [[], []]
        assert [scene_.gone(copy) for copy in scene_.copies] == [{"before": False}, {"before": False, "hidden": True}]


RULES = json.dumps({"public.posts": "user_id = auth.uid() or is_public"})


@pytest.mark.parametrize("has_database", [True, False])
async def test_a_supabase_that_falls_silent_while_it_answers_heartbeats_is_found_out_by_the_canary(
    has_database: bool, database: str, namespace: str
) -> None:
    settings = {"BRIDGE_CANARY_TABLE": "public.canary"} | ({} if has_database else {"BRIDGE_POLICIES": RULES})
    async with scene(database, namespace, has_database=has_database, **settings) as scene_:
        await scene_.seeded()
        async with connected(database) as connection:
            await consumed(connection)
        scene_.supabase.deafen()
        silent_at = time.time()
        await scene_.lose()
        await eventually(lambda: "did not tell of the canary" in scene_.bridge.log, 20)
        assert await metric(scene_.bridge, "complete_until_seconds") < silent_at + 0.1
        await scene_.told()
        await scene_.flows()
        await eventually(lambda: is_ready(scene_))
        await scene_.ends_well()
        assert [copy.resyncs for copy in scene_.copies] == [[], []]
        assert [scene_.gone(copy) for copy in scene_.copies] == [{"before": False}, {"before": False, "hidden": True}]
        assert "canary" not in str([copy.history for copy in scene_.copies])


async def test_a_supabase_that_tells_nobody_of_any_change_is_not_taken_for_healthy(
    database: str, namespace: str
) -> None:
    async with scene(database, namespace, BRIDGE_CANARY_TABLE="public.canary") as scene_:
        await scene_.seeded()
        scene_.supabase.drop(sys.maxsize)
        await eventually(scene_.problem, 30)
        scene_.supabase.drop(0)
        await scene_.flows()
        await eventually(lambda: is_ready(scene_), 30)
        await scene_.ends_well()


async def test_a_supabase_that_cannot_be_asked_for_what_it_has_lost_is_one_resync(
    database: str, namespace: str
) -> None:
    async with scene(database, namespace, BRIDGE_REPAIR_COLUMN="changed_at") as scene_:
        await scene_.seeded()
        await scene_.lose()
        await scene_.supabase.close(1012)
        await eventually(lambda: all(copy.resyncs for copy in scene_.copies), FLOWS_WITHIN)
        await scene_.flows()
        await scene_.ends_well()
        # Until its rows are read again, what is hidden may be one to whom it was hidden before, too.
        assert [copy.resyncs.count("upstream_gap") for copy in scene_.copies] == [1, 1]
        assert not any(map(is_repaired, chain(*(copy.history for copy in scene_.copies))))


async def is_ready(scene: Scene) -> bool:
    return not await scene.problem()


async def test_a_supabase_that_is_only_slow_or_repeats_itself_is_no_gap(database: str, namespace: str) -> None:
    async with scene(database, namespace) as scene_:
        scene_.supabase.delay(1.5)
        await scene_.flows()
        scene_.supabase.delay(0.5)  # so that what is repeated comes behind what is newer
        scene_.supabase.repeat(25)
        await scene_.flows()
        scene_.supabase.freeze()
        await asyncio.sleep(1)  # how long it lasts
        scene_.supabase.thaw()
        await scene_.flows()
        await scene_.ends_well()
        assert [copy.resyncs for copy in scene_.copies] == [[], []]
