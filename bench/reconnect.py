"""What 5,000 clients cost that are all cut at once and come back with their positions, and what others notice of it.

Decides how many users one question for facts may be about, whether it should wait for others to come, and whether the
loop is given back often enough. All that a user may see rests on a table of memberships. Cut off, each misses some
changes; they come back to the same process, which knows them, to another one, which does not, and to one that was
started meanwhile and has nothing in its window. 50 others, who never leave, are told of a change all the time.

Questions for facts are counted by Postgres (pg_stat_statements), commands by Redis. The clients are one process beside
the bridges, and so are those who write and read meanwhile: their work is part of the times.
"""

import asyncio
import gc
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
import jwt
import orjson
import uvloop
from redis.asyncio import Redis

from bench.drain import SECRET, UPGRADE, bridge
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.sources.postgres import ensure_publication

USERS: Final = int(os.environ.get("N", 5_000))
OF_A_TEAM: Final = 100
READERS: Final = 50
"""Those who never leave; they are team 0."""
TEAMS: Final = USERS // OF_A_TEAM
MISSED: Final = 4
"""Changes of each team while its members are away."""
PAUSE_SECONDS: Final = 0.1
QUIET_SECONDS: Final = 5.0
TEXT: Final = 0x81
PING: Final = 0x89
PONG: Final = 0x8A
"""First bytes of frames."""

SCHEMA: Final = f"""
create extension pg_stat_statements;
create function id_of(number int) returns uuid language sql as
  $$ select (lpad(to_hex(number), 8, '0') || '-0000-4000-8000-000000000000')::uuid $$;
create table members (user_id uuid, team int, primary key (user_id, team));
create policy own on members for select using (user_id = auth.uid());
create table papers (id bigserial primary key, team int, number int, body text);
create policy team on papers for select using (
  team in (select m.team from members m where m.user_id = auth.uid()));
alter table members replica identity full, enable row level security;
alter table papers replica identity full, enable row level security;
grant select on members, papers to authenticated;
insert into members select id_of(n), 1 + n / {OF_A_TEAM} from generate_series(0, {USERS - 1}) n;
insert into members select id_of({USERS} + n), 0 from generate_series(0, {READERS - 1}) n;
"""
QUESTIONS: Final = r"""
select coalesce(sum(calls), 0)::int from pg_stat_statements
where query like 'do $%' and query like '%\_claims constant%' and query not like '%\_lasts constant%'
"""
"""How often a block for the facts of users has run: see `policy.blocks`."""


class Client(asyncio.Protocol):
    """A client of bare bytes that comes back with its position.

    Attributes:
        team: whose papers it sees.
        arrived: number and time of each paper.
        faults: messages that should not have come, or not there.
        is_ready, has_all: done with the time of `ready`, and of the last of the papers that are expected.
    """

    def __init__(self, number: int, team: int) -> None:
        claims = {"sub": f"{number:08x}-0000-4000-8000-000000000000", "role": "authenticated"}
        self._token = jwt.encode({**claims, "aud": "authenticated", "exp": 2**33}, SECRET)
        self.team = team
        self.arrived: list[tuple[int, float]] = []
        self.faults = 0
        self._position = ""
        self._wanted = 0
        self._last = 0

    async def come(self, port: int) -> None:
        """Connect; done once it was told `ready`."""
        loop = asyncio.get_running_loop()
        self._data = self._said = b""
        self._open = self._left = False
        self.is_ready: asyncio.Future[float] = loop.create_future()
        self.has_all: asyncio.Future[float] = loop.create_future()
        self._lost: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda: self, "127.0.0.1", port)
        await self.is_ready

    def expect(self, papers: int) -> None:
        """Have `has_all` done after so many papers more."""
        self._wanted = len(self.arrived) + papers

    async def go(self) -> None:
        """Cut the link."""
        self._left = True
        self._transport.abort()
        await self._lost

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it writes
        self._transport = transport
        query = "?table=papers" + (f"&position={self._position}" if self._position else "")
        lines = [f"GET /ws{query} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self._token}", *UPGRADE]
        transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._open:
            head, end, rest = self._data.partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 101 "), head
            self._open, self._data = True, rest
        now = time.perf_counter()
        found, self._data = frames(self._data)
        for kind, payload in found:
            if kind == TEXT:
                self._take(orjson.loads(payload), now)
            elif kind == PING:
                self._transport.write(bytes((PONG, 0x80 | len(payload), 0, 0, 0, 0)) + payload)
            self._said = payload

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set_result(None)
        for future in (self.is_ready, self.has_all):
            if not (future.done() or self._left):
                future.set_exception(ConnectionError(f"a client was cut off: {self._said!r}"))

    def _take(self, message: dict[str, Any], now: float) -> None:
        self._position = message.get("position", self._position)
        if message["type"] == "ready":
            self.is_ready.set_result(now)
        elif message["type"] == "INSERT":
            paper = message["record"]
            self.faults += paper["team"] != self.team or self._last not in (0, paper["number"] - 1)
            self._last = paper["number"]
            self.arrived.append((self._last, now))
            if len(self.arrived) == self._wanted:
                self.has_all.set_result(now)
        elif message["type"] != "ping":
            self.faults += 1


def frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """First byte and payload of the whole frames in what a server sent, and what is left."""
    found = []
    while len(data) >= 2:
        size, begin = data[1], 2
        if size == 126:
            size, begin = int.from_bytes(data[2:4], "big"), 4
        if len(data) < begin + size:
            break
        found.append((data[0], data[begin : begin + size]))
        data = data[begin + size :]
    return found, data


# -- the herd, in a process of its own ---------------------------------------------------------------------------------


def herd(orders: Connection) -> None:
    """Do what is told: `come` to a port and wait for so many papers each, `go`, or stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def work() -> None:
        clients = [Client(number, 1 + number // OF_A_TEAM) for number in range(USERS)]
        gc.freeze()
        while (order := await asyncio.to_thread(orders.recv)) is not None:
            if order == "go":
                await asyncio.gather(*(client.go() for client in clients))
                orders.send(None)
            else:
                orders.send(await come(clients, *order))

    uvloop.run(work())


class Return(NamedTuple):
    """How all came back.

    Attributes:
        ready, complete: seconds after the first began to connect, of each.
    """

    ready: Sequence[float]
    complete: Sequence[float]
    faults: int


async def come(clients: Sequence[Client], port: int, papers: int) -> Return:
    begin = time.perf_counter()
    for client in clients:
        client.expect(papers)
    await asyncio.gather(*(client.come(port) for client in clients))
    complete = await asyncio.gather(*(client.has_all for client in clients)) if papers else []
    ready = [client.is_ready.result() - begin for client in clients]
    return Return(ready, [at - begin for at in complete], sum(client.faults for client in clients))


class Herd:
    """The herd as seen from here."""

    def __init__(self) -> None:
        self._orders, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=herd, args=(theirs,))

    async def __aenter__(self) -> "Herd":
        self._process.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._orders.send(None)
        await asyncio.to_thread(self._process.join, 5)
        self._process.kill()

    async def go(self) -> None:
        await self._do("go")

    async def come(self, port: int, papers: int) -> Return:
        return Return(*await self._do((port, papers)))

    async def _do(self, order: object) -> Any:
        self._orders.send(order)
        return await asyncio.to_thread(self._orders.recv)


# -- what is counted ---------------------------------------------------------------------------------------------------


class Writer:
    """Writes papers: one of team 0 all the time, and those that the herd misses.

    Attributes:
        began: when each of team 0 was begun to be written.
    """

    def __init__(self, connection: "asyncpg.Connection[Any]") -> None:
        self._connection = connection
        self._missed = 0
        self.began: dict[int, float] = {}

    async def run(self, dsn: str) -> None:
        own = await asyncpg.connect(dsn)
        while True:
            number = len(self.began) + 1
            self.began[number] = time.perf_counter()
            await own.execute("insert into papers (team, number, body) values (0, $1, repeat('x', 200))", number)
            await asyncio.sleep(PAUSE_SECONDS)

    async def write_missed(self) -> None:
        for _ in range(MISSED):
            self._missed += 1
            await self._connection.execute(
                "insert into papers (team, number, body) select t, $1, repeat('x', 200) from generate_series(1, $2) t",
                self._missed,
                TEAMS,
            )


class Counts(NamedTuple):
    questions: int
    commands: Mapping[str, int]


class Stage:
    """Engines, writer, readers, herd."""

    def __init__(self, connection: "asyncpg.Connection[Any]", redis: "Redis", herd: Herd) -> None:
        self.connection = connection
        self.redis = redis
        self.herd = herd
        self.writer = Writer(connection)
        self.readers = [Client(USERS + number, 0) for number in range(READERS)]

    async def counts(self) -> Counts:
        stats = await self.redis.info("commandstats")
        commands = {name.removeprefix("cmdstat_"): int(value["calls"]) for name, value in stats.items()}
        return Counts(await self.connection.fetchval(QUESTIONS), commands)

    async def move_readers(self, port: int) -> None:
        for reader in self.readers:
            await reader.go()
            await reader.come(port)

    def delays(self, begin: float, end: float) -> list[float]:
        """Milliseconds from before each INSERT in a time to each reader."""
        began = self.writer.began
        return [
            (at - began[number]) * 1000
            for reader in self.readers
            for number, at in reader.arrived
            if begin <= began[number] <= end
        ]

    async def quiet(self) -> list[float]:
        begin = time.perf_counter()
        await asyncio.sleep(QUIET_SECONDS)
        end = time.perf_counter()
        await asyncio.sleep(1)
        return self.delays(begin, end)


async def measure(title: str, stage: Stage, pid: int, back: Callable[[], Awaitable[Return]]) -> None:
    quiet = await stage.quiet()
    before = await stage.counts()
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the most memory is counted anew
    begin = time.perf_counter()
    spent = cpu(pid)
    if os.environ.get("PYTHONPATH"):
        os.kill(pid, signal.SIGUSR1)
    found = await back()
    end = time.perf_counter()
    if os.environ.get("PYTHONPATH"):
        os.kill(pid, signal.SIGUSR1)
    spent = cpu(pid) - spent
    after = await stage.counts()
    await asyncio.sleep(2)  # for what readers are told late
    used = {name: count - before.commands.get(name, 0) for name, count in after.commands.items()}
    most = ", ".join(f"{name} {count}" for name, count in sorted(used.items(), key=lambda item: -item[1])[:4])
    print(f"-- {title}")
    print(f"   questions for facts    {after.questions - before.questions:8d}")
    print(f"   commands to Redis      {sum(used.values()):8d}    {most}")
    for name, seconds in (("told ready", found.ready), ("has all it missed", found.complete)):
        if seconds:
            print(f"   {name:22} {statistics.median(seconds):8.2f} s  median, {max(seconds):.2f} s the last")
    for name, delays in (("others, before", quiet), ("others, meanwhile", stage.delays(begin, end))):
        p99 = statistics.quantiles(delays, n=100)[98]
        print(f"   {name:22} {statistics.median(delays):8.1f} ms median, {p99:.1f} ms p99, {max(delays):.1f} ms most")
    print(f"   CPU of the bridge      {spent:8.1f} s  of {end - begin:.1f} s")
    print(f"   most memory            {memory(pid) / 1024:8.0f} MiB")
    print(f"   faults                 {found.faults + sum(reader.faults for reader in stage.readers):8d}", flush=True)


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """KiB that a process has had resident at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


async def run(postgres: str, redis_url: str) -> None:
    settings = {"REDIS_URL": redis_url, "BRIDGE_TABLES": "public.posts,public.papers"}
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(postgres)
        await connection.execute(SCHEMA)
        await ensure_publication(postgres, "realtime_bridge", ["public.posts", "public.papers", "public.members"])
        stage = Stage(connection, Redis.from_url(redis_url), await stack.enter_async_context(Herd()))
        herd_ = stage.herd
        first, port = await stack.enter_async_context(bridge(postgres, **settings))
        other, other_port = await stack.enter_async_context(bridge(postgres, **settings))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        writing = tasks.create_task(stage.writer.run(postgres))
        await asyncio.gather(*(reader.come(port) for reader in stage.readers))

        async def back(port: int) -> Return:
            await herd_.go()
            await stage.writer.write_missed()
            return await herd_.come(port, MISSED)

        await measure("all come for the first time", stage, first.pid, lambda: herd_.come(port, 0))
        await measure("back to the process that knows them", stage, first.pid, lambda: back(port))
        await stage.move_readers(other_port)
        await measure("to another replica", stage, other.pid, lambda: back(other_port))
        async with bridge(postgres, **settings) as (third, third_port):
            await stage.move_readers(third_port)
            await measure("to a process that has begun since", stage, third.pid, lambda: back(third_port))
            writing.cancel()
            await asyncio.gather(*(reader.go() for reader in stage.readers))


def main() -> Any:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < (needed := USERS + READERS + 1000):
        sys.exit(f"open files are limited to {most}: this needs {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))  # of the others, too

    async def measured() -> None:
        options = {"shared_preload_libraries": "pg_stat_statements"}
        with EmbeddedPostgres(options=options) as postgres, EmbeddedValkey() as valkey:
            await install_schema(postgres.dsn())
            await run(postgres.dsn(), valkey.url)

    return measured()
