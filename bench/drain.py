"""How long a bridge takes to let 5,000 clients go when it is told to stop.

Decides whether all may be closed in one turn of the loop, or have to be in portions, so that everything fits into
`BRIDGE_DRAIN_SECONDS`. The clock starts with SIGTERM. The clients, which join in each close, are in one process beside
the bridge, and their work is part of the figures.
"""

import asyncio
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import jwt

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.sources.postgres import ensure_publication

WEBSOCKETS: Final = 4500
STREAMS: Final = 400
POLLS: Final = 100
AT_ONCE: Final = 50
SECRET: Final = "a-secret-for-measuring-only-of-32-bytes"
USER: Final = "00000000-0000-0000-0000-000000000001"
ENVIRONMENT: Final = {
    "SUPABASE_JWT_SECRET": SECRET,
    "BRIDGE_MAX_CONNECTIONS_PER_USER": str(WEBSOCKETS + STREAMS + POLLS),
}
UPGRADE: Final = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
MASKED_CLOSE: Final = b"\x88\x80\x00\x00\x00\x00"


class Client(asyncio.Protocol):
    """One client of bare bytes.

    Attributes:
        opened: done with the first message.
        ended: done with the time at which the connection was over.
    """

    def __init__(self, path: str, *headers: str) -> None:
        token = jwt.encode({"sub": USER, "role": "authenticated", "aud": "authenticated", "exp": 2**33}, SECRET)
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", *headers]
        self._request = "\r\n".join([*lines, "", ""]).encode()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.said = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.said = self.said[-500:] + data
        if b'"type":"ready"' in data and not self.opened.done():
            self.opened.set_result(None)
        if b"retry in" in data:
            self._transport.write(MASKED_CLOSE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(time.perf_counter())


async def open_clients(port: int, count: int, make: Callable[[], Client]) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    while len(clients) < count:
        made = [loop.create_connection(make, "127.0.0.1", port) for _ in range(min(AT_ONCE, count - len(clients)))]
        clients += [client for _, client in await asyncio.gather(*made)]
    return clients


@asynccontextmanager
async def bridge(dsn: str, **settings: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A running bridge, and its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "realtime_bridge", "serve", "--port", "0"),
        env={**os.environ, **ENVIRONMENT, "DATABASE_URL": dsn, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        while not (found := re.search(rb'"port":"(\d+)"', line := await process.stdout.readline())):
            if not line:
                sys.exit("the bridge did not start")
        yield process, int(found[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def measure(dsn: str) -> None:
    async with bridge(dsn) as (process, port):
        begin = time.perf_counter()
        sockets = await open_clients(port, WEBSOCKETS, lambda: Client("/ws", *UPGRADE))
        streams = await open_clients(port, STREAMS, lambda: Client("/events", "Accept: text/event-stream"))
        await asyncio.gather(*(client.opened for client in (*sockets, *streams)))
        print(f"{WEBSOCKETS + STREAMS} opened in {time.perf_counter() - begin:.1f} s, and {POLLS} polls wait")
        polls = await open_clients(port, POLLS, lambda: Client("/events?wait=60"))
        await asyncio.sleep(1)  # for the polls, which say nothing, to have arrived
        told = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        for name, clients in (("WebSockets closed", sockets), ("streams ended", streams), ("polls answered", polls)):
            print(line(name, [at - told for at in await asyncio.gather(*(client.ended for client in clients))]))
        await process.wait()
        print(f"process ended          {time.perf_counter() - told:6.2f} s")
    missed = sum(b"retry in" not in client.said for client in sockets)
    missed += sum(not re.search(rb"\nretry: \d+\n\n$", client.said) for client in streams)
    missed += sum(b'"messages":[]' not in client.said for client in polls)
    after = [int(found[1]) for client in sockets if (found := re.search(rb"retry in (\d+) ms", client.said))]
    print(f"without a farewell     {missed:6d}")
    print(f"to come back after     {min(after):6d} to {max(after)} ms, {statistics.median(after):.0f} ms median")


def line(name: str, seconds: Sequence[float]) -> str:
    return f"{name:22} {statistics.median(seconds):6.2f} s median, {max(seconds):.2f} s the last"


def main() -> Any:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < (needed := WEBSOCKETS + STREAMS + POLLS + 1000):
        sys.exit(f"open files are limited to {most}: this needs {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))  # of the bridge, too

    async def run() -> None:
        with EmbeddedPostgres() as postgres:
            await install_schema(postgres.dsn())
            await ensure_publication(postgres.dsn(), "realtime_bridge", ["public.posts"])
            await measure(postgres.dsn())

    return run()
