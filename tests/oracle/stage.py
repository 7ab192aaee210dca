"""Engines, bridges, proxies, writer and copies, put together; and the quiet moments when all is compared."""

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import httpx

from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import http
from tests.oracle.copies import TRANSPORTS, Copy
from tests.oracle.judge import Judge
from tests.oracle.truth import LEDGER, Truth, open_connection, read_as
from tests.oracle.world import KEYS, SCHEMA, TRANSACTION_ROWS, USERS, Key, Row
from tests.oracle.writer import Writer
from tests.proxies import Proxy
from tests.services import eventually, running

SLOT: Final = "oracle"
COPIES: Final = 18
COMPLETE_SECONDS: Final = 45.0
_LOG_SHOWN: Final = 4000
_VIOLATIONS_SHOWN: Final = 4
_SETTINGS: Final = {
    "BRIDGE_SLOT": SLOT,
    "BRIDGE_NAMESPACE": "oracle",
    "BRIDGE_TABLES": ",".join(KEYS),
    "BRIDGE_TRANSACTION_ROWS": str(TRANSACTION_ROWS),
    "BRIDGE_MAX_CONNECTIONS_PER_USER": "100",
    "BRIDGE_PING_SECONDS": "1",
    "BRIDGE_RESYNC_SECONDS": "0.5",
}


class Replica:
    """A bridge with a proxy on each of its links.

    Attributes:
        door: where clients come in.
    """

    def __init__(
        self, postgres: EmbeddedPostgres, valkey: EmbeddedValkey, plant: Callable[[], None] | None, **settings: str
    ) -> None:
        self.door = Proxy()
        self.to_valkey = Proxy(valkey.port)
        self.to_postgres = Proxy(postgres.port)
        self._postgres = postgres
        self._plant = plant
        self._settings = {**_SETTINGS, **settings}

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """The proxies listen, and the bridge is ready, until the block ends."""
        async with AsyncExitStack() as stack:
            for proxy in (self.door, self.to_valkey, self.to_postgres):
                await stack.enter_async_context(proxy)
            database = self._postgres.dsn().replace(f":{self._postgres.port}/", f":{self.to_postgres.port}/")
            redis_url = f"redis://127.0.0.1:{self.to_valkey.port}/0"
            self.bridge = BridgeProcess(database, REDIS_URL=redis_url, **self._settings)
            self.bridge.plant = self._plant
            await stack.enter_async_context(self.bridge)
            self.door.upstream = self.bridge.port
            yield

    @property
    def url(self) -> str:
        """The door's address."""
        return f"http://127.0.0.1:{self.door.port}"

    async def leads(self) -> bool:
        """Whether it reads the source; one that does not answer does not."""
        try:
            async with http(self.bridge.url) as client:
                page = (await client.get("/metrics", timeout=1)).text
        except httpx.TransportError:
            return False
        return re.search(r"^realtime_bridge_leading 1", page, re.M) is not None


class Stage:
    """Everything, while it runs.

    Attributes:
        seed: of all that is random.
        complete_seconds: for so long `settle` waits for copies that lack something.
    """

    def __init__(
        self, seed: int, postgres: EmbeddedPostgres, valkey: EmbeddedValkey, replicas: Sequence[Replica]
    ) -> None:
        self.seed = seed
        self.postgres = postgres
        self.valkey = valkey
        self.replicas = replicas
        self.truth = Truth()
        self.judge = Judge(self.truth)
        self.writer = Writer(postgres.dsn(), self.truth, seed)
        self.copies: list[Copy] = []
        self.complete_seconds = COMPLETE_SECONDS

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[None]:
        """Copies that follow, and a writer that writes as soon as all of them have begun."""
        doors = [replica.url for replica in self.replicas]
        parts = zip(range(COPIES), itertools.cycle(TRANSPORTS), itertools.cycle(USERS), strict=False)
        self.copies = [
            transport(user, doors, self.postgres.dsn(), lambda: self.truth.begun, self.seed + i)
            for i, transport, user in parts
        ]
        async with asyncio.TaskGroup() as tasks:
            lasting = [tasks.create_task(copy.run()) for copy in self.copies]
            await eventually(lambda: all(copy.has_begun for copy in self.copies), 30)
            lasting.append(tasks.create_task(self.writer.run()))
            try:
                yield
            finally:
                for task in lasting:
                    task.cancel()

    async def roles(self) -> tuple[Replica, Replica]:
        """The one that leads, and the other one."""

        async def leader() -> Replica | None:
            leading = [replica for replica in self.replicas if await replica.leads()]
            return leading[0] if len(leading) == 1 else None

        found = await eventually(leader, 30)
        assert found is not None
        return found, next(replica for replica in self.replicas if replica is not found)

    async def settle(self) -> None:
        """Stop writing, wait until every copy has all and was told of all, and judge what was told until then."""
        async with self.writer.turn:
            await self.writer.mark()
            expected = await self._select()
            late = set(self.copies)

            def is_complete() -> bool:
                equal = [copy for copy in late if copy.rows == expected[copy.user.name]]
                late.difference_update([copy for copy in equal if self.judge.was_told(copy)])
                return not late

            try:
                await eventually(is_complete, self.complete_seconds)
            except AssertionError:
                for copy in late:
                    if copy.rows != expected[copy.user.name]:
                        self.judge.accuse(copy, _difference(copy, expected[copy.user.name]))
            self.judge.review(self.copies)

    async def _select(self) -> Mapping[str, Mapping[str, dict[Key, Row]]]:
        """What `SELECT` shows, by user and table."""
        connection = await open_connection(self.postgres.dsn())
        try:
            return {
                user.name: {table: await read_as(connection, user, table) for table in user.tables} for user in USERS
            }
        finally:
            await connection.close()

    @property
    def resumed(self) -> Counter[str]:
        """How often each transport has gone on from a position."""
        found: Counter[str] = Counter()
        for copy in self.copies:
            found[copy.transport] += copy.resumed
        return found

    @property
    def tracebacks(self) -> list[str]:
        """Exceptions that bridges have logged: whatever breaks around them, they are to know what to do."""
        lines = [line for replica in self.replicas for line in replica.bridge.log.splitlines()]
        return [line for line in lines if '"exception":' in line]

    def report(self) -> str:
        """What is wrong, for people, with the seed and what the bridges have logged."""
        shown = self.judge.violations[:_VIOLATIONS_SHOWN]
        head = f"seed {self.seed}: {len(self.judge.violations)} violations in {self.truth.newest.number} transactions"
        logs = [f"--- bridge {i}\n{replica.bridge.log[-_LOG_SHOWN:]}" for i, replica in enumerate(self.replicas)]
        return "\n\n".join([head, *shown, *logs])


def _difference(copy: Copy, expected: Mapping[str, dict[Key, Row]]) -> str:
    found = []
    for table, rows in expected.items():
        own = copy.rows[table]
        if own != rows:
            other = [key for key in rows.keys() & own.keys() if rows[key] != own[key]]
            found.append(
                f"of {table} missing {rows.keys() - own.keys()}, too many {own.keys() - rows.keys()}, {other=}"
            )
    return f"the copy is not what SELECT shows: {'; '.join(found)}"


@asynccontextmanager
async def stage(seed: int, *, plant: Callable[[], None] | None = None, **settings: str) -> AsyncIterator[Stage]:
    """A stage on which everything runs; the writer writes from now on.

    Args:
        seed: of all that is random; it is noted on whatever goes wrong.
        plant: called in the bridges' processes before anything else: see `planted`.
        settings: of the bridges.
    """
    try:
        async with AsyncExitStack() as stack:
            postgres = stack.enter_context(running(EmbeddedPostgres(options={"track_commit_timestamp": "on"})))
            valkey = stack.enter_context(running(EmbeddedValkey(durable=True)))
            it = Stage(seed, postgres, valkey, [Replica(postgres, valkey, plant, **settings) for _ in range(2)])
            await _install(postgres.dsn())
            await it.writer.begin()
            stack.push_async_callback(it.writer.close)
            await asyncio.gather(*(stack.enter_async_context(replica.standing()) for replica in it.replicas))
            async with it.playing():
                yield it
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


async def _install(dsn: str) -> None:
    await install_schema(dsn)
    connection = await open_connection(dsn)
    await connection.execute(SCHEMA)
    await connection.execute(LEDGER)
    await connection.close()
    await ensure_publication(dsn, PUBLICATION, list(KEYS))
